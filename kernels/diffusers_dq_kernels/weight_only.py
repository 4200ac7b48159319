# SPDX-License-Identifier: Apache-2.0
"""Floating-point activations times int8 or int4 weights, for the few rows of a modulation linear.

    z[m, n] = (sum_k x[m, k] W[n, k]) * weight_scale[n] + bias[g, n],   finished as in _epilogue.py

There it is the bytes of W that cost time, not the multiplications.
"""
# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import FLOATS, rows_of
from ._epilogue import Epilogue, store_output
from ._gemm import Tile, TileTable, check_weight, launch, tile_index
from ._library import announce, define_op
from ._triton import jit, tl
from .w4a8 import unpack_tile
from .packing import unpack_int4

__all__ = ["linear_w4a16", "linear_w8a16"]

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor group, Tensor? gate=None,"
    " Tensor? residual=None, str activation='none') -> Tensor"
)


def _epilogue(
    x: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    group: Tensor,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Epilogue:
    """The parameters of these ops as those of all linears: nothing to undo for an input that was not rounded."""
    return Epilogue(weight_scale, None, None, None, bias, group, x.dtype, gate, residual, activation)


# Reference


def linear_w8a16_reference(x: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    """residual + gate * activation(x W^T + bias[g]) with W = weight * weight_scale.

    x: [..., K] float.   weight: [N, K] int8.   parameters: weight_scale, bias, group, gate, residual, activation: see
    `Epilogue`.   Returns [..., N] of x's dtype, computed in fp64 if x is, else in fp32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return _epilogue(x, *parameters).apply(x.to(wide) @ weight.to(wide).t())


def linear_w4a16_reference(x: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    """`linear_w8a16` with packed weights.   weight: [N, K / 2] uint8, the rest as there."""
    return linear_w8a16_reference(x, unpack_int4(weight), *parameters)


# CPU


def _linear_w8a16_cpu(x: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    epilogue = _epilogue(x, *parameters)
    _check(x, weight, torch.int8, epilogue)
    return _weight_only_cpu(x, weight, epilogue)


def _linear_w4a16_cpu(x: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    epilogue = _epilogue(x, *parameters)
    _check(x, weight, torch.uint8, epilogue)
    return _weight_only_cpu(x, unpack_int4(weight), epilogue)


def _weight_only_cpu(x: Tensor, weight: Tensor, epilogue: Epilogue) -> Tensor:
    acc = _float_int8_matmul(rows_of(x), weight)
    return epilogue.apply(acc.view(*x.shape[:-1], weight.shape[0]))


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


@jit("M")
def _linear_weight_only_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    epilogue,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    GELU: tl.constexpr,
):
    """One program computes a [BLOCK_N, BLOCK_M] tile of y^T = W x^T, with W widened to x's dtype in registers.

    uint8 weights hold two int4 a byte.
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
    store_output(acc, offs_m[None, :], offs_n[:, None], y_ptr, epilogue, M, N, GELU)


# Launchers

_NO_FP64 = "no Triton kernel for float64 inputs: plain torch in float64"

# Narrow in N: with one row block the columns alone must fill the GPU.
TILES: TileTable = {
    (8, 0): ((16, Tile(16, 64, 128, 4, 4)), (64, Tile(64, 64, 64, 4, 3)), (math.inf, Tile(128, 128, 32, 8, 3))),
}
# fp32 in three tf32 products needs three times the registers.
TILES_FP32: TileTable = {(8, 0): ((16, Tile(16, 64, 64, 8, 3)), (math.inf, Tile(64, 64, 32, 8, 3)))}


def _linear_w8a16_triton(x: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    epilogue = _epilogue(x, *parameters)
    _check(x, weight, torch.int8, epilogue)
    if x.dtype == torch.float64:
        announce("linear_w8a16", _NO_FP64)
        return linear_w8a16_reference(x, weight, *parameters)
    return launch("linear_w8a16", _linear_weight_only_kernel, _tiles(x.dtype), x, weight, epilogue)


def _linear_w4a16_triton(x: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    epilogue = _epilogue(x, *parameters)
    _check(x, weight, torch.uint8, epilogue)
    if x.dtype == torch.float64:
        announce("linear_w4a16", _NO_FP64)
        return linear_w4a16_reference(x, weight, *parameters)
    return launch("linear_w4a16", _linear_weight_only_kernel, _tiles(x.dtype), x, weight, epilogue)


def _tiles(dtype: torch.dtype) -> TileTable:
    return TILES_FP32 if dtype == torch.float32 else TILES


def _check(x: Tensor, weight: Tensor, weight_dtype: torch.dtype, epilogue: Epilogue) -> None:
    if x.dtype not in FLOATS or x.dim() == 0:
        raise ValueError(f"x: expected float [..., K], got {x.dtype} {list(x.shape)}")
    check_weight(x.shape[-1], weight, weight_dtype)
    epilogue.check(x.shape[:-1], weight.shape[0])


# Registration


def _fake(x: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


linear_w8a16 = define_op(
    "linear_w8a16" + _SCHEMA,
    linear_w8a16_reference,
    fake=_fake,
    cpu=_linear_w8a16_cpu,
    triton=_linear_w8a16_triton,
)

linear_w4a16 = define_op(
    "linear_w4a16" + _SCHEMA,
    linear_w4a16_reference,
    fake=_fake,
    cpu=_linear_w4a16_cpu,
    triton=_linear_w4a16_triton,
)
