# SPDX-License-Identifier: Apache-2.0
"""Floating-point activations times int8 or int4 weights, for the few rows of a modulation linear.

    z[m, n] = (sum_k x[m, k] W[n, k]) * weight_scale[n] + bias[g, n],   finished as in _epilogue.py

or, with scales for every group j of input channels, and perhaps zero points (AWQ, arXiv 2306.00978),

    z[m, n] = (sum_j weight_scale[n, j] sum_(k in j) x[m, k] (W[n, k] - weight_zero_point[n, j])) + bias[g, n]

There it is the bytes of W that cost time, not the multiplications.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import FLOATS, contiguous, expect, rows_of
from ._epilogue import FINISH_SCHEMA, Epilogue, store_output
from ._gemm import check_weight, empty_output, launch
from ._groups import dequantize_groups, group_size, largest_block_k, unit_scale
from ._library import announce, define_op
from ._triton import jit, tl
from .packing import unpack_int4
from .w4a8 import reads_pairs, transposed_tile, unpack_tile

__all__ = ["linear_w4a16", "linear_w8a16"]

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor group,"
    f" {FINISH_SCHEMA}, Tensor? weight_zero_point=None) -> Tensor"
)


class _Parameters(NamedTuple):
    """What follows input and weight in the schema; see `linear_w8a16_reference`."""

    weight_scale: Tensor
    bias: Tensor | None
    group: Tensor
    gate: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"
    weight_zero_point: Tensor | None = None

    @property
    def grouped(self) -> bool:
        return self.weight_scale.dim() == 2

    def epilogue(self, out_dtype: torch.dtype) -> Epilogue:
        """Nothing is to be undone for an input that was not rounded."""
        scale = unit_scale(self.weight_scale) if self.grouped else self.weight_scale
        finish = (self.gate, self.residual, self.activation)
        return Epilogue(scale, None, None, None, self.bias, self.group, out_dtype, *finish)

    def check(self, x: Tensor, weight: Tensor, weight_dtype: torch.dtype) -> int | None:
        """Returns the group size, if any; ValueError for what a kernel would read out of bounds."""
        if x.dtype not in FLOATS or x.dim() == 0:
            raise ValueError(f"x: expected float [..., K], got {x.dtype} {list(x.shape)}")
        check_weight(x.shape[-1], weight, weight_dtype)
        if self.grouped:
            expect("weight_scale", self.weight_scale, (torch.float32,), (weight.shape[0], "K / g"))
        self.epilogue(x.dtype).check(x.shape[:-1], weight.shape[0])
        if self.weight_zero_point is not None:
            if not self.grouped:
                raise ValueError("weight_scale: expected [N, K / g] beside a weight_zero_point, got [N]")
            expect("weight_zero_point", self.weight_zero_point, (torch.int8,), tuple(self.weight_scale.shape))
        return group_size("weight_scale", self.weight_scale, x.shape[-1]) if self.grouped else None


# Reference


def linear_w8a16_reference(x: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    """residual + gate * activation(x W^T + bias[g]) with W = (weight - weight_zero_point) * weight_scale.

    x: [..., K] float.   weight: [N, K] int8.   parameters: weight_scale [N] fp32, or [N, K / g] with g a multiple of
    32 that divides K; bias, group, gate, residual, activation: see `Epilogue`.   weight_zero_point: [N, K / g] int8 or
    None, beside scales of groups; of int4 weights weight - weight_zero_point fits in int8.
    Returns [..., N] of x's dtype, computed in fp64 if x is, else in fp32.
    """
    p = _Parameters(*parameters)
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = p.weight_scale if p.grouped else torch.ones_like(p.weight_scale)[:, None]
    w = dequantize_groups(weight, p.weight_zero_point, scale, wide)
    return p.epilogue(x.dtype).apply(x.to(wide) @ w.t())


def linear_w4a16_reference(x: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    """`linear_w8a16` with packed weights.   weight: [N, K / 2] uint8, the rest as there."""
    return linear_w8a16_reference(x, unpack_int4(weight), *parameters)


# CPU

# Of a weight, dequantized at a time: they stay in cache (2 x 1152 x 6912, g = 128, 1 core: 11.8 ms at once, 3.5 ms in
# pieces; as much as without groups).
_WEIGHTS_AT_ONCE = 1 << 19


def _linear_w8a16_cpu(x: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    return _weight_only_cpu(x, weight, torch.int8, parameters)


def _linear_w4a16_cpu(x: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    return _weight_only_cpu(x, weight, torch.uint8, parameters)


def _weight_only_cpu(x: Tensor, weight: Tensor, weight_dtype: torch.dtype, parameters: tuple[Any, ...]) -> Tensor:
    p, rows = _Parameters(*parameters), rows_of(x)
    p.check(x, weight, weight_dtype)
    if p.grouped:
        acc = _float_grouped_matmul(rows, weight, p.weight_scale, p.weight_zero_point)
    else:
        acc = _float_int8_matmul(rows, unpack_int4(weight) if weight_dtype == torch.uint8 else weight)
    return p.epilogue(x.dtype).apply(acc.view(*x.shape[:-1], weight.shape[0]))


def _float_grouped_matmul(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """x: [M, K] float.   weight: [N, K] int8 or [N, K / 2] uint8.   scale, zero_point: [N, K / g].   Returns [M, N].

    In fp32, also for bf16 where there are few rows; else the dequantized weight is rounded to bf16, which CPUs
    multiply several times faster. PyTorch's own int4 kernel (aten::_weight_int4pack_mm_for_cpu) wants a layout of its
    own, bf16 scales, and 8 ms of packing for 3 ms saved (1152 x 6912): no use without a second copy of the weight.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    product = x.dtype if x.dtype == torch.bfloat16 and len(x) > 32 else wide
    x, n = x.to(product), weight.shape[0]
    y = torch.empty(len(x), n, dtype=product)
    step = max(1, _WEIGHTS_AT_ONCE // max(1, x.shape[1]))
    for start in range(0, n, step):
        piece = slice(start, start + step)
        q = unpack_int4(weight[piece]) if weight.dtype == torch.uint8 else weight[piece]
        w = dequantize_groups(q, None if zero_point is None else zero_point[piece], scale[piece], wide)
        y[:, piece] = F.linear(x, w.to(product))
    return y


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
    scale_ptr,
    zero_point_ptr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    GELU: tl.constexpr,
):
    """One program computes a [BLOCK_N, BLOCK_M] tile of y^T = W x^T, with W widened to x's dtype in registers.

    uint8 weights hold two int4 a byte. scale_ptr, zero_point_ptr: [N, K / GROUP] or None.
    What is scaled are the sums over a block, which lies in one group: where there are few rows they are fewer than
    weights, and nothing is rounded but in fp32.
    """
    PER_LOAD: tl.constexpr = 4 if PAIRS else 2 if weight_ptr.dtype.element_ty == tl.uint8 else 1
    offs_m, offs_n, x_ptrs, weight_ptrs = transposed_tile(
        x_ptr, weight_ptr, M, N, stride_xm, stride_wn, PER_LOAD, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M
    )
    offs_k = tl.arange(0, BLOCK_K)
    offs_load = tl.arange(0, BLOCK_K // PER_LOAD)
    groups = (offs_n % N) * (K // GROUP)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_k[:, None] < K - k, other=0.0)
            weight = tl.load(weight_ptrs, mask=offs_load[None, :] < (K - k) // PER_LOAD, other=0)
        if zero_point_ptr is not None:
            zero_point = tl.load(zero_point_ptr + groups + k // GROUP)[:, None]
            if PER_LOAD > 1:
                weight = unpack_tile(weight, None, zero_point)
            else:
                weight = weight.to(tl.int16) - zero_point.to(tl.int16)
        elif PER_LOAD > 1:
            weight = unpack_tile(weight, None, None)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + groups + k // GROUP)[:, None]
            acc += tl.dot(weight.to(x.dtype), x, input_precision="tf32x3") * scale
        else:
            acc = tl.dot(weight.to(x.dtype), x, acc, input_precision="tf32x3")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K // PER_LOAD
    store_output(acc, offs_m[None, :], offs_n[:, None], y_ptr, epilogue, M, N, GELU)


# Launchers


def _linear_w8a16_triton(x: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    return _weight_only_triton("linear_w8a16", linear_w8a16_reference, torch.int8, x, weight, parameters)


def _linear_w4a16_triton(x: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    return _weight_only_triton("linear_w4a16", linear_w4a16_reference, torch.uint8, x, weight, parameters)


def _weight_only_triton(
    name: str,
    reference: Callable[..., Tensor],
    weight_dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    parameters: tuple[Any, ...],
) -> Tensor:
    p = _Parameters(*parameters)
    group = p.check(x, weight, weight_dtype)
    if x.dtype == torch.float64:
        announce(name, "no Triton kernel for float64 inputs: plain torch in float64")
        return reference(x, weight, *parameters)
    extra = (
        p.weight_scale.contiguous() if p.grouped else None,
        contiguous(p.weight_zero_point),
        group or 1,
        weight_dtype == torch.uint8 and reads_pairs(weight),
    )
    block_k = None if group is None else largest_block_k(group)
    return launch(name, _linear_weight_only_kernel, name, x, weight, p.epilogue(x.dtype), extra, block_k)


# Registration


def _fake(x: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    return empty_output(x, weight, x.dtype)


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
