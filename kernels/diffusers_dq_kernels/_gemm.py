# SPDX-License-Identifier: Apache-2.0
"""What all quantized linears share: checks, tile tables, the order of tiles, the epilogue in its three forms.

    y[m, n] = (acc[m, n] - zero_point[g] * weight_sum[n]) * (input_scale * weight_scale[n]) + bias[g, n]

The input scale is one number for the current group g (static) or one a row (dynamic); acc is an exact integer.
M rows, N out_features, K in_features, G timestep groups.
"""
# mypy: disable-error-code="no-untyped-def"

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._arguments import FLOATS, expect, expect_group, expect_table, rows_of
from ._library import announce
from ._tables import table_row, table_row_index
from ._triton import jit, tl, triton

__all__ = [
    "RAGGED",
    "Tile",
    "TileTable",
    "bias_table",
    "check_gemm",
    "check_weight",
    "dequantize_cpu",
    "dequantize_reference",
    "launch",
    "linear_fake",
    "store_dequantized",
    "tile_index",
    "tiles_for",
]


class Tile(NamedTuple):
    """What one program computes, and with how much hardware."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Compute capability -> (largest M, tile) with M rising. A capability that is not listed takes the next lower one.
TileTable = dict[tuple[int, int], tuple[tuple[float, Tile], ...]]

# For sizes or strides that are not multiples of 16: loads of single bytes, which make larger tiles spill registers.
RAGGED = Tile(32, 64, 32, 8, 2)

# Programs of GROUP_M row blocks that follow one another read the same columns of the weight from L2.
_GROUP_M = 8


# Checks


def check_gemm(
    xq: Tensor,
    weight: Tensor,
    weight_dtype: torch.dtype,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    group: Tensor,
    out_dtype: torch.dtype,
) -> None:
    """ValueError for what a kernel would read out of bounds or misread. Static when there is a zero point."""
    if xq.dtype != torch.int8 or xq.dim() == 0:
        raise ValueError(f"xq: expected int8 [..., K], got {xq.dtype} {list(xq.shape)}")
    if out_dtype not in (*FLOATS, torch.int32):
        raise ValueError(f"out_dtype: expected a floating-point type or torch.int32, got {out_dtype}")
    check_weight(xq.shape[-1], weight, weight_dtype, weight_scale, bias, group)
    if input_zero_point is None or weight_sum is None:
        if input_scale.dtype != torch.float32 or input_scale.shape != xq.shape[:-1]:
            given = f"{input_scale.dtype} {list(input_scale.shape)}"
            raise ValueError(f"input_scale: expected torch.float32 {list(xq.shape[:-1])}, got {given}")
        return
    expect("weight_sum", weight_sum, (torch.int32,), (weight.shape[0],))
    expect_table("input_scale", input_scale, (torch.float32,))
    expect_table("input_zero_point", input_zero_point, (torch.int32,))


def check_weight(
    k: int, weight: Tensor, weight_dtype: torch.dtype, weight_scale: Tensor, bias: Tensor | None, group: Tensor
) -> None:
    """int8 weights are [N, K], uint8 ones hold two values a byte: [N, K / 2]."""
    packed = weight_dtype == torch.uint8
    if packed and k % 2:
        raise ValueError(f"weight: int4 needs an even K, got K = {k}")
    expect("weight", weight, (weight_dtype,), ("N", k // 2 if packed else k))
    expect("weight_scale", weight_scale, (torch.float32,), (weight.shape[0],))
    expect_group(group)
    rows = bias_table(bias)
    if rows is not None:
        expect_table("bias", rows, FLOATS, (weight.shape[0],))


def bias_table(bias: Tensor | None) -> Tensor | None:
    """[N] or [G, N] as [G, N]."""
    return bias[None] if bias is not None and bias.dim() == 1 else bias


# Epilogue in plain torch


def dequantize_reference(
    acc: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    group: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """acc: [..., N] fp64, integers, zero point already out.   input_scale: [..., 1] or [1].   Returns [..., N]."""
    if out_dtype == torch.int32:
        return acc.to(torch.int32)
    y = acc * input_scale.double() * weight_scale.double()
    rows = bias_table(bias)
    return (y if rows is None else y + table_row(rows, group)[0]).to(out_dtype)


def dequantize_cpu(
    acc: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    group: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """The same from int32 in fp32, in place on one buffer."""
    if out_dtype == torch.int32:
        return acc
    y = acc.to(torch.float32)
    if input_scale.numel() == 1:
        y.mul_(input_scale.reshape(1) * weight_scale)
    else:
        y.mul_(input_scale).mul_(weight_scale)
    rows = bias_table(bias)
    if rows is not None:
        y.add_(table_row(rows, group)[0])
    return y.to(out_dtype)


# Kernel parts


@jit()
def tile_index(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row block, column block) of this program: GROUP_M row blocks go through the columns together."""
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M
    group_m = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    within = pid % (GROUP_M * blocks_n)
    return first_m + within % group_m, within // group_m


@jit()
def store_dequantized(
    acc,
    m,
    n,
    y_ptr,
    weight_scale_ptr,
    weight_sum_ptr,
    input_scale_ptr,
    zero_point_ptr,
    bias_ptr,
    group_ptr,
    M,
    N,
    scale_groups,
    zero_point_groups,
    bias_groups,
):
    """Finish one tile and store it. m, n: row and column of each element, in any two shapes that broadcast to acc's.

    With a zero point the input scale is a table over groups; without one it is [M]; None means no input scale.
    """
    if zero_point_ptr is not None:
        zero_point = tl.load(zero_point_ptr + table_row_index(group_ptr, zero_point_groups))
        acc -= zero_point * tl.load(weight_sum_ptr + n, mask=n < N, other=0)
    if y_ptr.dtype.element_ty == tl.int32:
        y = acc
    else:
        scale = tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)
        if zero_point_ptr is not None:
            scale *= tl.load(input_scale_ptr + table_row_index(group_ptr, scale_groups))
        y = acc.to(tl.float32) * scale
        if input_scale_ptr is not None and zero_point_ptr is None:
            y *= tl.load(input_scale_ptr + m, mask=m < M, other=0.0)
        if bias_ptr is not None:
            bias_ptr += table_row_index(group_ptr, bias_groups) * N
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + m.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=(m < M) & (n < N))


# Launcher


def launch(
    op_name: str,
    kernel: Any,
    tiles: TileTable,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    group: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """Run one of the linear kernels: they take the same arguments in the same order.   Returns [..., N]."""
    rows = rows_of(x)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias = bias_table(bias)
    M, K = rows.shape
    N = weight.shape[0]
    y = torch.empty((*x.shape[:-1], N), dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    if _is_aligned(rows) and _is_aligned(weight):
        tile = pick_tile(tiles, capability(x.device), M)
    else:
        announce(op_name, "K or a stride is not a multiple of 16: loads of single bytes, slower")
        tile = RAGGED
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),)](
            rows,
            weight,
            y,
            weight_scale.contiguous(),
            None if weight_sum is None else weight_sum.contiguous(),
            None if input_scale is None else input_scale.contiguous(),
            None if input_zero_point is None else input_zero_point.contiguous(),
            None if bias is None else bias.contiguous(),
            group,
            M,
            N,
            K,
            rows.stride(0),
            weight.stride(0),
            1 if input_scale is None or input_zero_point is None else input_scale.shape[0],
            1 if input_zero_point is None else input_zero_point.shape[0],
            1 if bias is None else bias.shape[0],
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=_GROUP_M,
            EVEN_K=K % tile.block_k == 0,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y


def tiles_for(tiles: TileTable, compute_capability: tuple[int, int]) -> tuple[tuple[float, Tile], ...]:
    """The entry of the newest architecture that is not newer than this one, else of the oldest."""
    return tiles[max((known for known in tiles if known <= compute_capability), default=min(tiles))]


def pick_tile(tiles: TileTable, compute_capability: tuple[int, int], m: int) -> Tile:
    """A look-up and not an autotuner: nothing runs twice, and a CUDA graph may capture the first call."""
    return next(tile for largest, tile in tiles_for(tiles, compute_capability) if m <= largest)


def _is_aligned(matrix: Tensor) -> bool:
    return all(size % 16 == 0 for size in (matrix.shape[1], matrix.stride(0), matrix.data_ptr()))


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the lowest of all for the interpreter, which runs any tile."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def linear_fake(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    """Shape and dtype of the integer linears, whose last parameter is out_dtype."""
    return torch.empty((*xq.shape[:-1], weight.shape[0]), dtype=parameters[-1], device=xq.device)
