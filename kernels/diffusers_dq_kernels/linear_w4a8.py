# SPDX-License-Identifier: Apache-2.0
"""int8 activations times int4 weights, two a byte as saved (packing.py), unpacked where they are multiplied."""
# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any

import torch
from torch import Tensor

from ._gemm import Tile, TileTable, check_gemm, launch, linear_fake, store_dequantized, tile_index
from ._library import define_op
from ._triton import jit, tl
from .linear_w8a8 import (
    dynamic_cpu,
    int_mm_caveat,
    linear_w8a8_dynamic_reference,
    linear_w8a8_static_reference,
    static_cpu,
)
from .packing import unpack_int4

__all__ = ["linear_w4a8_dynamic", "linear_w4a8_static", "unpack_tile"]


# Reference


def linear_w4a8_static_reference(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    """`linear_w8a8_static` with packed weights.   weight: [N, K / 2] uint8, the rest as there."""
    return linear_w8a8_static_reference(xq, unpack_int4(weight), *parameters)


def linear_w4a8_dynamic_reference(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    """`linear_w8a8_dynamic` with packed weights.   weight: [N, K / 2] uint8, the rest as there."""
    return linear_w8a8_dynamic_reference(xq, unpack_int4(weight), *parameters)


# CPU


def _linear_w4a8_static_cpu(
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
    check_gemm(xq, weight, torch.uint8, *parameters)
    return static_cpu("linear_w4a8_static", xq, unpack_int4(weight), *parameters)


def _linear_w4a8_dynamic_cpu(
    xq: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    group: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    check_gemm(xq, weight, torch.uint8, weight_scale, None, input_scale, None, bias, group, out_dtype)
    parameters = (weight_scale, input_scale, bias, group, out_dtype)
    return dynamic_cpu("linear_w4a8_dynamic", xq, unpack_int4(weight), *parameters)


# Kernel


@jit()
def unpack_tile(packed):
    """[BLOCK_N, BLOCK_K / 2] uint8 to [BLOCK_N, BLOCK_K] int8. Neighbours in a byte stay neighbours: few prmt."""
    pairs = packed.to(tl.int8, bitcast=True)
    both = tl.join((pairs << 4) >> 4, pairs >> 4)  # [BLOCK_N, BLOCK_K / 2, 2]
    return tl.reshape(both, (packed.shape[0], 2 * packed.shape[1]))


@jit("M", "scale_groups", "zero_point_groups", "bias_groups")
def _linear_w4a8_kernel(
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
    """One program computes a [BLOCK_N, BLOCK_M] tile of y^T = W x^T.

    Transposed because an unpacked weight stays in registers as the left operand of the tensor cores; as the right
    one it would go through shared memory.
    """
    pid_m, pid_n = tile_index(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_byte = tl.arange(0, BLOCK_K // 2)
    # Rows past the end read other rows, which is cheaper than masking them; the store leaves them out.
    x_ptrs = x_ptr + (offs_m % M).to(tl.int64)[None, :] * stride_xm + offs_k[:, None]
    weight_ptrs = weight_ptr + (offs_n % N).to(tl.int64)[:, None] * stride_wn + offs_byte[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            packed = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_k[:, None] < K - k, other=0)
            packed = tl.load(weight_ptrs, mask=offs_byte[None, :] < K // 2 - k // 2, other=0)
        acc = tl.dot(unpack_tile(packed), x, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K // 2
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

_SMALL = Tile(16, 128, 128, 4, 4)
TILES: TileTable = {
    (8, 0): ((16, _SMALL), (64, Tile(64, 128, 128, 4, 3)), (math.inf, Tile(128, 128, 64, 8, 4))),
    (9, 0): ((16, _SMALL), (64, Tile(64, 128, 128, 4, 4)), (math.inf, Tile(128, 128, 128, 8, 4))),
}


def _linear_w4a8_static_triton(
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
    check_gemm(xq, weight, torch.uint8, *parameters)
    return launch("linear_w4a8_static", _linear_w4a8_kernel, TILES, xq, weight, *parameters)


def _linear_w4a8_dynamic_triton(
    xq: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    group: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    parameters = (weight_scale, None, input_scale, None, bias, group, out_dtype)
    check_gemm(xq, weight, torch.uint8, *parameters)
    return launch("linear_w4a8_dynamic", _linear_w4a8_kernel, TILES, xq, weight, *parameters)


# Registration

linear_w4a8_static = define_op(
    "linear_w4a8_static(Tensor xq, Tensor weight, Tensor weight_scale, Tensor weight_sum, Tensor input_scale,"
    " Tensor input_zero_point, Tensor? bias, Tensor group, ScalarType out_dtype) -> Tensor",
    linear_w4a8_static_reference,
    fake=linear_fake,
    cpu=_linear_w4a8_static_cpu,
    triton=_linear_w4a8_static_triton,
    cpu_caveat=int_mm_caveat,
)

linear_w4a8_dynamic = define_op(
    "linear_w4a8_dynamic(Tensor xq, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor? bias,"
    " Tensor group, ScalarType out_dtype) -> Tensor",
    linear_w4a8_dynamic_reference,
    fake=linear_fake,
    cpu=_linear_w4a8_dynamic_cpu,
    triton=_linear_w4a8_dynamic_triton,
    cpu_caveat=int_mm_caveat,
)
