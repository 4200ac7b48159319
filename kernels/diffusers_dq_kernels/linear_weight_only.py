# SPDX-License-Identifier: Apache-2.0
"""Floating-point activations times int8 or int4 weights, for the few rows of a modulation linear.

    y[m, n] = (sum_k x[m, k] W[n, k]) * weight_scale[n] + bias[g, n]

There it is the bytes of W that cost time, not the multiplications.
"""
# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import FLOATS, rows_of
from ._gemm import Tile, TileTable, bias_table, check_weight, launch, store_dequantized, tile_index
from ._library import announce, define_op
from ._tables import table_row
from ._triton import jit, tl
from .linear_w4a8 import unpack_tile
from .packing import unpack_int4

__all__ = ["linear_w4a16", "linear_w8a16"]


# Reference


def linear_w8a16_reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: Tensor
) -> Tensor:
    """x W^T with W = weight * weight_scale, plus bias[g].

    x: [..., K] float.   weight: [N, K] int8.   weight_scale: [N] fp32.   bias: [N] or [G, N] float.
    group: [1] int64.   Returns [..., N] of x's dtype, computed in fp32 (fp64 if x is).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ (weight.to(wide) * weight_scale[:, None].to(wide)).t()
    rows = bias_table(bias)
    return (y if rows is None else y + table_row(rows, group)[0]).to(x.dtype)


def linear_w4a16_reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: Tensor
) -> Tensor:
    """`linear_w8a16` with packed weights.   weight: [N, K / 2] uint8, the rest as there."""
    return linear_w8a16_reference(x, unpack_int4(weight), weight_scale, bias, group)


# CPU


def _linear_w8a16_cpu(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: Tensor) -> Tensor:
    _check(x, weight, torch.int8, weight_scale, bias, group)
    return _weight_only_cpu(x, weight, weight_scale, bias, group)


def _linear_w4a16_cpu(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: Tensor) -> Tensor:
    _check(x, weight, torch.uint8, weight_scale, bias, group)
    return _weight_only_cpu(x, unpack_int4(weight), weight_scale, bias, group)


def _weight_only_cpu(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: Tensor) -> Tensor:
    y = _float_int8_matmul(rows_of(x), weight)
    y = y.to(torch.promote_types(y.dtype, torch.float32)).mul_(weight_scale)
    rows = bias_table(bias)
    if rows is not None:
        y.add_(table_row(rows, group))
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _float_int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x: [M, K] float, weight: [N, K] int8.   Returns [M, N], unscaled: bf16 for bf16, at least fp32 otherwise.

    PyTorch's own kernel reads int8 directly, which pays up to 8 rows of bf16; it crashes unless K is a multiple of
    16 and both operands are aligned (a tensor of a mapped file need not be). Its scales are of x's dtype, so ours,
    fp32, come after. fp16 is widened: unscaled sums pass 65504.
    """
    if x.dtype == torch.bfloat16 and 0 < x.shape[0] <= 8 and x.shape[1] % 16 == 0 and weight.numel():
        return torch._weight_int8pack_mm(_aligned(x), _aligned(weight), x.new_ones(weight.shape[0]))
    wide = x.dtype if x.dtype == torch.bfloat16 else torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide))


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous and from the start of a 64-byte line; copied where it is not."""
    x = x.contiguous()
    return x if x.data_ptr() % 64 == 0 else x.clone()


# Kernel


@jit("M", "scale_groups", "zero_point_groups", "bias_groups")
def _linear_weight_only_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    weight_scale_ptr,
    weight_sum_ptr,
    input_scale_ptr,
    zero_point_ptr,
    bias_ptr,
    group_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    scale_groups,
    zero_point_groups,
    bias_groups,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One program computes a [BLOCK_N, BLOCK_M] tile of y^T = W x^T, with W widened to x's dtype in registers.

    uint8 weights hold two int4 a byte. weight_sum, input_scale and zero_point are None.
    """
    PER_BYTE: tl.constexpr = 2 if weight_ptr.dtype.element_ty == tl.uint8 else 1
    pid_m, pid_n = tile_index(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_byte = tl.arange(0, BLOCK_K // PER_BYTE)
    # Rows past the end read other rows, which is cheaper than masking them; the store leaves them out.
    x_ptrs = x_ptr + (offs_m % M).to(tl.int64)[None, :] * stride_xm + offs_k[:, None]
    weight_ptrs = weight_ptr + (offs_n % N).to(tl.int64)[:, None] * stride_wn + offs_byte[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_k[:, None] < K - k, other=0.0)
            weight = tl.load(weight_ptrs, mask=offs_byte[None, :] < K // PER_BYTE - k // PER_BYTE, other=0)
        if PER_BYTE == 2:
            weight = unpack_tile(weight)
        acc = tl.dot(weight.to(x.dtype), x, acc, input_precision="tf32x3")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K // PER_BYTE
    store_dequantized(
        acc,
        offs_m[None, :],
        offs_n[:, None],
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
    )


# Launchers

_NO_FP64 = "no Triton kernel for float64 inputs: plain torch in float64"

# Narrow in N: with one row block the columns alone must fill the GPU.
TILES: TileTable = {
    (8, 0): ((16, Tile(16, 64, 128, 4, 4)), (64, Tile(64, 64, 64, 4, 3)), (math.inf, Tile(128, 128, 32, 8, 3))),
}
# fp32 in three tf32 products needs three times the registers.
TILES_FP32: TileTable = {(8, 0): ((16, Tile(16, 64, 64, 8, 3)), (math.inf, Tile(64, 64, 32, 8, 3)))}


def _linear_w8a16_triton(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: Tensor
) -> Tensor:
    _check(x, weight, torch.int8, weight_scale, bias, group)
    if x.dtype == torch.float64:
        announce("linear_w8a16", _NO_FP64)
        return linear_w8a16_reference(x, weight, weight_scale, bias, group)
    return _launch("linear_w8a16", x, weight, weight_scale, bias, group)


def _linear_w4a16_triton(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: Tensor
) -> Tensor:
    _check(x, weight, torch.uint8, weight_scale, bias, group)
    if x.dtype == torch.float64:
        announce("linear_w4a16", _NO_FP64)
        return linear_w4a16_reference(x, weight, weight_scale, bias, group)
    return _launch("linear_w4a16", x, weight, weight_scale, bias, group)


def _launch(
    op_name: str, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, group: Tensor
) -> Tensor:
    """Without weight sums, input scales and zero points: the input is not rounded."""
    tiles, kernel = _tiles(x.dtype), _linear_weight_only_kernel
    return launch(op_name, kernel, tiles, x, weight, weight_scale, None, None, None, bias, group, x.dtype)


def _tiles(dtype: torch.dtype) -> TileTable:
    return TILES_FP32 if dtype == torch.float32 else TILES


def _check(
    x: Tensor, weight: Tensor, weight_dtype: torch.dtype, weight_scale: Tensor, bias: Tensor | None, group: Tensor
) -> None:
    if x.dtype not in FLOATS or x.dim() == 0:
        raise ValueError(f"x: expected float [..., K], got {x.dtype} {list(x.shape)}")
    check_weight(x.shape[-1], weight, weight_dtype, weight_scale, bias, group)


# Registration


def _fake(x: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


linear_w8a16 = define_op(
    "linear_w8a16(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor group) -> Tensor",
    linear_w8a16_reference,
    fake=_fake,
    cpu=_linear_w8a16_cpu,
    triton=_linear_w8a16_triton,
)

linear_w4a16 = define_op(
    "linear_w4a16(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor group) -> Tensor",
    linear_w4a16_reference,
    fake=_fake,
    cpu=_linear_w4a16_cpu,
    triton=_linear_w4a16_triton,
)
