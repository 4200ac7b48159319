# SPDX-License-Identifier: Apache-2.0
"""Activations to int8, with the shift and the smoothing of the current timestep group on the way.

    u = (x - shift[g]) * inv_smooth
    q = clamp(round(u / scale) + zero_point, -2^(bits - 1), 2^(bits - 1) - 1)

All of it in fp32 and in this order, rounding half to even, so that every form gives the same integers.
M rows, K in_features, G timestep groups; a table of one row serves every group.
"""
# mypy: disable-error-code="no-untyped-def"
# (Triton kernels: an annotated argument would mean a type to its compiler.)

import torch
from torch import Tensor

from ._arguments import FLOATS, expect, expect_group, expect_table, rows_of
from ._library import define_op
from ._tables import table_row, table_row_index
from ._triton import jit, tl, triton

__all__ = ["quantize_dynamic", "quantize_static"]

_TINY = torch.finfo(torch.float32).tiny
_MAX_BLOCK_K = 4096


# Reference


def quantize_static_reference(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    shift: Tensor | None,
    inv_smooth: Tensor | None,
    bits: int,
) -> Tensor:
    """Quantize with calibrated parameters, one scale and zero point a timestep group.

    x: [..., K] float.   scale: [G] fp32.   zero_point: [G] int32.   group: [1] int64.   shift: [G, K] fp32.
    inv_smooth: [K] fp32.   bits: 2 to 8.   Returns [..., K] int8.
    """
    u = _transform(x, group, shift, inv_smooth)
    q = torch.round(u / table_row(scale, group)) + table_row(zero_point, group)
    return q.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)


def quantize_dynamic_reference(
    x: Tensor, group: Tensor, shift: Tensor | None, inv_smooth: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """Quantize each row with its own largest absolute value, symmetric.

    x: [..., K] float.   group: [1] int64.   shift: [G, K] fp32.   inv_smooth: [K] fp32.   bits: 2 to 8.
    Returns [..., K] int8 and the scales [...] fp32.
    """
    u = _transform(x, group, shift, inv_smooth)
    qmax = 2 ** (bits - 1) - 1
    scale = (u.abs().amax(-1) / qmax).clamp_min(_TINY)
    return torch.round(u / scale[..., None]).clamp(-qmax, qmax).to(torch.int8), scale


def _transform(x: Tensor, group: Tensor, shift: Tensor | None, inv_smooth: Tensor | None) -> Tensor:
    u = x.float()
    if shift is not None:
        u = u - table_row(shift, group)
    if inv_smooth is not None:
        u = u * inv_smooth
    return u


# CPU: the same passes, in place on one fp32 buffer


def _quantize_static_cpu(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    shift: Tensor | None,
    inv_smooth: Tensor | None,
    bits: int,
) -> Tensor:
    _check(x, group, shift, inv_smooth, bits)
    expect_table("scale", scale, (torch.float32,))
    expect_table("zero_point", zero_point, (torch.int32,))
    offset = int(table_row(zero_point, group))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    u = _transform_owned(x, group, shift, inv_smooth).div_(table_row(scale, group)).round_()
    if offset:
        u.add_(offset)
    return u.clamp_(low, high).to(torch.int8)


def _quantize_dynamic_cpu(
    x: Tensor, group: Tensor, shift: Tensor | None, inv_smooth: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    _check(x, group, shift, inv_smooth, bits)
    qmax = 2 ** (bits - 1) - 1
    u = _transform_owned(x, group, shift, inv_smooth)
    scale = torch.maximum(u.amax(-1), -u.amin(-1)).div_(qmax).clamp_min_(_TINY)
    return u.div_(scale[..., None]).round_().clamp_(-qmax, qmax).to(torch.int8), scale


def _transform_owned(x: Tensor, group: Tensor, shift: Tensor | None, inv_smooth: Tensor | None) -> Tensor:
    """`_transform` into a contiguous buffer that the caller may overwrite: never x itself."""
    u = torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)
    if shift is not None:
        u.sub_(table_row(shift, group))
    if inv_smooth is not None:
        u.mul_(inv_smooth)
    return u


# Kernels


@jit()
def _load_transformed(x_ptr, shift_ptr, inv_smooth_ptr, offs_k, mask_k):
    """[BLOCK_K] fp32: a piece of one row, shifted and smoothed. Masked lanes are zero."""
    u = tl.load(x_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        u -= tl.load(shift_ptr + offs_k, mask=mask_k, other=0.0)
    if inv_smooth_ptr is not None:
        u *= tl.load(inv_smooth_ptr + offs_k, mask=mask_k, other=0.0)
    return u


@jit()
def _round_clamp(v, low, high):
    """Round half to even inside [low, high], integers below 2^22 in size.

    Adding 1.5 * 2^23 leaves no bit for a fraction; it rounds as torch.round does, on the GPU and in the interpreter.
    """
    v = tl.minimum(tl.maximum(v, low), high)
    return (v + 12582912.0) - 12582912.0


@jit("scale_groups", "zero_point_groups", "shift_groups", "low", "high")
def _quantize_static_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_point_ptr,
    group_ptr,
    shift_ptr,
    inv_smooth_ptr,
    K,
    stride_xm,
    scale_groups,
    zero_point_groups,
    shift_groups,
    low,
    high,
    BLOCK_K: tl.constexpr,
):
    """One program quantizes one row of x, BLOCK_K columns at a time."""
    m = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + table_row_index(group_ptr, scale_groups))
    zero_point = tl.load(zero_point_ptr + table_row_index(group_ptr, zero_point_groups)).to(tl.float32)
    if shift_ptr is not None:
        shift_ptr += table_row_index(group_ptr, shift_groups) * K
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        u = _load_transformed(x_ptr + m * stride_xm, shift_ptr, inv_smooth_ptr, offs_k, mask_k)
        q = _round_clamp(tl.div_rn(u, scale), low - zero_point, high - zero_point) + zero_point
        tl.store(q_ptr + m * K + offs_k, q.to(tl.int8), mask=mask_k)


@jit("shift_groups", "qmax")
def _quantize_dynamic_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    group_ptr,
    shift_ptr,
    inv_smooth_ptr,
    K,
    stride_xm,
    shift_groups,
    qmax,
    tiny,
    BLOCK_K: tl.constexpr,
):
    """One program quantizes one row of x: a pass for its largest absolute value, a pass (from cache) to round."""
    m = tl.program_id(0).to(tl.int64)
    if shift_ptr is not None:
        shift_ptr += table_row_index(group_ptr, shift_groups) * K
    largest = tl.zeros((BLOCK_K,), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        u = _load_transformed(x_ptr + m * stride_xm, shift_ptr, inv_smooth_ptr, offs_k, offs_k < K)
        largest = tl.maximum(largest, tl.abs(u))
    qmax = qmax.to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(largest, axis=0), qmax), tiny)
    tl.store(scale_ptr + m, scale)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        u = _load_transformed(x_ptr + m * stride_xm, shift_ptr, inv_smooth_ptr, offs_k, mask_k)
        q = _round_clamp(tl.div_rn(u, scale), -qmax, qmax)
        tl.store(q_ptr + m * K + offs_k, q.to(tl.int8), mask=mask_k)


# Launchers


def _quantize_static_triton(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    shift: Tensor | None,
    inv_smooth: Tensor | None,
    bits: int,
) -> Tensor:
    _check(x, group, shift, inv_smooth, bits)
    expect_table("scale", scale, (torch.float32,))
    expect_table("zero_point", zero_point, (torch.int32,))
    rows = rows_of(x)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if q.numel():
        with torch.cuda.device_of(x):
            _quantize_static_kernel[(rows.shape[0],)](
                rows,
                q,
                scale.contiguous(),
                zero_point.contiguous(),
                group,
                None if shift is None else shift.contiguous(),
                None if inv_smooth is None else inv_smooth.contiguous(),
                rows.shape[1],
                rows.stride(0),
                scale.shape[0],
                zero_point.shape[0],
                1 if shift is None else shift.shape[0],
                -(2 ** (bits - 1)),
                2 ** (bits - 1) - 1,
                BLOCK_K=_block_k(rows.shape[1]),
            )
    return q


def _quantize_dynamic_triton(
    x: Tensor, group: Tensor, shift: Tensor | None, inv_smooth: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    _check(x, group, shift, inv_smooth, bits)
    rows = rows_of(x)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if q.numel():
        with torch.cuda.device_of(x):
            _quantize_dynamic_kernel[(rows.shape[0],)](
                rows,
                q,
                scale,
                group,
                None if shift is None else shift.contiguous(),
                None if inv_smooth is None else inv_smooth.contiguous(),
                rows.shape[1],
                rows.stride(0),
                1 if shift is None else shift.shape[0],
                2 ** (bits - 1) - 1,
                _TINY,
                BLOCK_K=_block_k(rows.shape[1]),
            )
    return q, scale


def _check(x: Tensor, group: Tensor, shift: Tensor | None, inv_smooth: Tensor | None, bits: int) -> None:
    if x.dtype not in FLOATS or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected float [..., K] with K > 0, got {x.dtype} {list(x.shape)}")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: expected 2 to 8, got {bits}")
    expect_group(group)
    if shift is not None:
        expect_table("shift", shift, (torch.float32,), (x.shape[-1],))
    if inv_smooth is not None:
        expect("inv_smooth", inv_smooth, (torch.float32,), (x.shape[-1],))


def _block_k(k: int) -> int:
    return min(int(triton.next_power_of_2(k)), _MAX_BLOCK_K)


# Registration


def _quantize_static_fake(x: Tensor, *args: object) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


def _quantize_dynamic_fake(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return q, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


quantize_static = define_op(
    "quantize_static(Tensor x, Tensor scale, Tensor zero_point, Tensor group, Tensor? shift, Tensor? inv_smooth,"
    " int bits) -> Tensor",
    quantize_static_reference,
    fake=_quantize_static_fake,
    cpu=_quantize_static_cpu,
    triton=_quantize_static_triton,
    compiled=quantize_static_reference,
)

quantize_dynamic = define_op(
    "quantize_dynamic(Tensor x, Tensor group, Tensor? shift, Tensor? inv_smooth, int bits) -> (Tensor, Tensor)",
    quantize_dynamic_reference,
    fake=_quantize_dynamic_fake,
    cpu=_quantize_dynamic_cpu,
    triton=_quantize_dynamic_triton,
    compiled=quantize_dynamic_reference,
)
