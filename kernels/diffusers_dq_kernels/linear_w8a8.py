# SPDX-License-Identifier: Apache-2.0
"""int8 activations times int8 weights, accumulated in int32, with the scales, the zero point and the bias applied."""
# mypy: disable-error-code="no-untyped-def"

import functools
import math

import torch
from torch import Tensor

from ._arguments import rows_of
from ._gemm import (
    Tile,
    TileTable,
    check_gemm,
    dequantize_cpu,
    dequantize_reference,
    launch,
    linear_fake,
    store_dequantized,
    tile_index,
)
from ._library import announce, define_op
from ._tables import table_row
from ._triton import jit, tl

__all__ = ["linear_w8a8_dynamic", "linear_w8a8_static"]


# Reference


def linear_w8a8_static_reference(
    xq: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor,
    bias: Tensor | None,
    group: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """((xq - zero_point[g]) W^T) * input_scale[g] * weight_scale + bias[g], parameters by timestep group.

    xq: [..., K] int8.   weight: [N, K] int8.   weight_scale: [N] fp32.   weight_sum: [N] int32, the sum of W over K.
    input_scale: [G] fp32.   input_zero_point: [G] int32.   bias: [N] or [G, N] float.   group: [1] int64.
    Returns [..., N] of out_dtype; torch.int32 asks for the bare integer (xq - zero_point) W^T.
    """
    # fp64 holds these integers exactly, below 2^53, and unlike int64 it has a matmul on every device.
    acc = xq.double() @ weight.double().t() - table_row(input_zero_point, group).double() * weight_sum.double()
    return dequantize_reference(acc, weight_scale, table_row(input_scale, group), bias, group, out_dtype)


def linear_w8a8_dynamic_reference(
    xq: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    group: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """(xq W^T) * input_scale[row] * weight_scale + bias[g], a scale for each row.

    xq: [..., K] int8.   weight: [N, K] int8.   weight_scale: [N] fp32.   input_scale: [...] fp32.
    bias: [N] or [G, N] float.   group: [1] int64.   Returns [..., N] of out_dtype; torch.int32 asks for xq W^T.
    """
    acc = xq.double() @ weight.double().t()
    return dequantize_reference(acc, weight_scale, input_scale[..., None], bias, group, out_dtype)


# CPU


def _linear_w8a8_static_cpu(
    xq: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor,
    bias: Tensor | None,
    group: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    parameters = (weight_scale, weight_sum, input_scale, input_zero_point, bias, group, out_dtype)
    check_gemm(xq, weight, torch.int8, *parameters)
    return static_cpu("linear_w8a8_static", xq, weight, *parameters)


def _linear_w8a8_dynamic_cpu(
    xq: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    group: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    check_gemm(xq, weight, torch.int8, weight_scale, None, input_scale, None, bias, group, out_dtype)
    return dynamic_cpu("linear_w8a8_dynamic", xq, weight, weight_scale, input_scale, bias, group, out_dtype)


def static_cpu(
    op_name: str,
    xq: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor,
    bias: Tensor | None,
    group: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """The CPU form without its checks, for every op whose weights are int8 by now."""
    acc = _int_matmul(op_name, xq, weight)
    zero_point = int(table_row(input_zero_point, group))
    if zero_point:
        acc.sub_(weight_sum, alpha=zero_point)
    return dequantize_cpu(acc, weight_scale, table_row(input_scale, group), bias, group, out_dtype)


def dynamic_cpu(
    op_name: str,
    xq: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    group: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    acc = _int_matmul(op_name, xq, weight)
    return dequantize_cpu(acc, weight_scale, input_scale[..., None], bias, group, out_dtype)


@functools.cache
def int_mm_caveat() -> str | None:
    """Why the CPU forms avoid torch._int_mm on this machine, or None where it is exact.

    Without VNNI instructions oneDNN multiplies with ones that saturate at 16 bits: wrong for large values, in silence.
    """
    for m in (1, 32):
        x = torch.full((m, 64), 127, dtype=torch.int8)
        try:
            exact = bool((torch._int_mm(x, x.new_full((64, 16), 127)) == 64 * 127 * 127).all())
        except RuntimeError as error:
            return f"torch._int_mm is not available on this CPU ({error}): exact floating-point matmul, slower"
        if not exact:
            return "torch._int_mm saturates on this CPU (no VNNI): exact floating-point matmul, slower"
    return None


def _int_matmul(op_name: str, xq: Tensor, weight: Tensor) -> Tensor:
    """xq: [..., K], weight: [N, K], both int8.   Returns [..., N] int32, exact."""
    caveat = int_mm_caveat()
    rows = rows_of(xq)
    if caveat is not None:
        announce(op_name, caveat)
        acc = _float_int_matmul(rows, weight)
    elif rows.shape[1] == 1:
        # torch._int_mm (2.13) takes a [1, N] operand for its transpose and reads past the end of it.
        acc = _float_int_matmul(rows, weight)
    else:
        acc = torch._int_mm(rows, weight.t())
    return acc.view(*xq.shape[:-1], weight.shape[0])


def _float_int_matmul(xq: Tensor, weight: Tensor) -> Tensor:
    """xq: [M, K], weight: [N, K], both int8.   Returns [M, N] int32.

    fp32 holds every integer up to 2^24, which 1024 products of two int8 cannot pass: exact in any order of summation.
    """
    acc = torch.zeros(xq.shape[0], weight.shape[0], dtype=torch.int32)
    for x_part, weight_part in zip(xq.split(1024, dim=1), weight.split(1024, dim=1), strict=True):
        acc += (x_part.float() @ weight_part.float().t()).to(torch.int32)
    return acc


# Kernel


@jit("M", "scale_groups", "zero_point_groups", "bias_groups")
def _linear_w8a8_kernel(
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
    """One program computes a [BLOCK_M, BLOCK_N] tile of y. Both operands are read along K, as they are stored."""
    pid_m, pid_n = tile_index(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the end read other rows, which is cheaper than masking them; the store leaves them out.
    x_ptrs = x_ptr + (offs_m % M).to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
    weight_ptrs = weight_ptr + (offs_n % N).to(tl.int64)[None, :] * stride_wn + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_k[None, :] < K - k, other=0)
            weight = tl.load(weight_ptrs, mask=offs_k[:, None] < K - k, other=0)
        acc = tl.dot(x, weight, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    store_dequantized(
        acc,
        offs_m[:, None],
        offs_n[None, :],
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

_SMALL = Tile(64, 64, 128, 4, 4)
TILES: TileTable = {
    (8, 0): ((64, _SMALL), (math.inf, Tile(128, 128, 64, 4, 4))),
    (8, 9): ((64, _SMALL), (math.inf, Tile(128, 128, 64, 4, 4))),
    (9, 0): ((64, _SMALL), (512, Tile(128, 128, 128, 8, 4)), (math.inf, Tile(128, 256, 128, 8, 4))),
    (10, 0): ((64, _SMALL), (math.inf, Tile(128, 128, 128, 8, 4))),
}


def _linear_w8a8_static_triton(
    xq: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor,
    bias: Tensor | None,
    group: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    parameters = (weight_scale, weight_sum, input_scale, input_zero_point, bias, group, out_dtype)
    check_gemm(xq, weight, torch.int8, *parameters)
    return launch("linear_w8a8_static", _linear_w8a8_kernel, TILES, xq, weight, *parameters)


def _linear_w8a8_dynamic_triton(
    xq: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    group: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    parameters = (weight_scale, None, input_scale, None, bias, group, out_dtype)
    check_gemm(xq, weight, torch.int8, *parameters)
    return launch("linear_w8a8_dynamic", _linear_w8a8_kernel, TILES, xq, weight, *parameters)


# Registration


linear_w8a8_static = define_op(
    "linear_w8a8_static(Tensor xq, Tensor weight, Tensor weight_scale, Tensor weight_sum, Tensor input_scale,"
    " Tensor input_zero_point, Tensor? bias, Tensor group, ScalarType out_dtype) -> Tensor",
    linear_w8a8_static_reference,
    fake=linear_fake,
    cpu=_linear_w8a8_static_cpu,
    triton=_linear_w8a8_static_triton,
    cpu_caveat=int_mm_caveat,
)

linear_w8a8_dynamic = define_op(
    "linear_w8a8_dynamic(Tensor xq, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor? bias,"
    " Tensor group, ScalarType out_dtype) -> Tensor",
    linear_w8a8_dynamic_reference,
    fake=linear_fake,
    cpu=_linear_w8a8_dynamic_cpu,
    triton=_linear_w8a8_dynamic_triton,
    cpu_caveat=int_mm_caveat,
)
