# SPDX-License-Identifier: Apache-2.0
"""Rows of fp32 to int8, rounding half to even, in every form.

    q = clamp(round(u / scale) + zero_point, qmin, qmax)        qmin = -2^(bits - 1), qmax = 2^(bits - 1) - 1

Static: scale and zero point of the current timestep group. Dynamic: found for each row, or for each group of channels
of a row. Symmetric: scale = max|u| / qmax, zero point 0, q at least -qmax. Asymmetric: with u in [a, b], widened to
contain 0, scale = (b - a) / (qmax - qmin) and zero_point = clamp(round(qmin - a / scale), qmin, qmax).

A scale is at least the smallest normal fp32: rows of zeros are zeros.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import expect_table
from ._tables import table_row, table_row_index
from ._triton import jit, tl

__all__ = ["Rounded", "Rounding", "round_dynamic_tile", "round_static_tile"]

_TINY = torch.finfo(torch.float32).tiny
_GROUP_MULTIPLE = 32


class Rounding(NamedTuple):
    """bits: 2 to 8.   scale, zero_point: [1 or G] fp32 and int32 if static, None if dynamic.

    group_size: channels of a row that share a dynamic scale, a multiple of 32; None for one scale a row.
    symmetric: of dynamic ones.
    """

    bits: int
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    group_size: int | None = None
    symmetric: bool = True

    @property
    def limits(self) -> tuple[int, int]:
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    @property
    def mode(self) -> str:
        return "static" if self.scale is not None else "symmetric" if self.symmetric else "asymmetric"

    def check(self, k: int) -> None:
        """ValueError for what a kernel would read out of bounds or misread."""
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits: expected 2 to 8, got {self.bits}")
        if self.scale is not None and self.zero_point is not None:
            expect_table("scale", self.scale, (torch.float32,))
            expect_table("zero_point", self.zero_point, (torch.int32,))
        size = self.group_size
        if size is not None and (size <= 0 or size % _GROUP_MULTIPLE or k % size):
            raise ValueError(
                f"group_size: expected a multiple of {_GROUP_MULTIPLE} that divides {k} in_features, got {size}"
            )

    def empty(self, shape: torch.Size, device: torch.device) -> "Rounded":
        """Room for what u of this shape is rounded to."""
        q = torch.empty(shape, dtype=torch.int8, device=device)
        if self.scale is not None:
            return Rounded(q)
        if self.group_size is None:
            return Rounded(q, torch.empty(shape[:-1], dtype=torch.float32, device=device))
        groups = (*shape[:-1], shape[-1] // self.group_size)
        scale = torch.empty(groups, dtype=torch.float32, device=device)
        return Rounded(q, scale, torch.empty(groups, dtype=torch.int32, device=device))

    def apply(self, u: Tensor, group: Tensor) -> "Rounded":
        """u: [..., K] fp32."""
        low, high = self.limits
        if self.scale is not None and self.zero_point is not None:
            q = torch.round(u / table_row(self.scale, group)) + table_row(self.zero_point, group)
            return Rounded(q.clamp(low, high).to(torch.int8))
        v = u.unflatten(-1, (-1, self.group_size or u.shape[-1]))
        if self.symmetric:
            scale = (v.abs().amax(-1) / high).clamp_min(_TINY)
            zero_point = torch.zeros_like(scale)
            q = torch.round(v / scale[..., None]).clamp(-high, high)
        else:
            least, most = v.amin(-1).clamp_max(0), v.amax(-1).clamp_min(0)
            scale = ((most - least) / (high - low)).clamp_min(_TINY)
            zero_point = torch.round(low - least / scale).clamp(low, high)
            q = (torch.round(v / scale[..., None]) + zero_point[..., None]).clamp(low, high)
        q = q.to(torch.int8).view(u.shape)
        return (
            Rounded(q, scale.squeeze(-1)) if self.group_size is None else Rounded(q, scale, zero_point.to(torch.int32))
        )

    def apply_in_place(self, u: Tensor, group: Tensor, into: "Rounded") -> None:
        """The same from a contiguous buffer that may be overwritten; scales of whole rows are [..., 1] here."""
        low, high = self.limits
        if self.scale is not None and self.zero_point is not None:
            u.div_(table_row(self.scale, group)).round_()
            offset = int(table_row(self.zero_point, group))
            into.q.copy_((u.add_(offset) if offset else u).clamp_(low, high))
            return
        v = u if self.group_size is None else u.view(*u.shape[:-1], -1, self.group_size)
        least, most = v.amin(-1, keepdim=True), v.amax(-1, keepdim=True)
        zero_point = None
        if self.symmetric:
            low = -high
            scale = torch.maximum(most, least.neg_()).div_(high).clamp_min_(_TINY)
        else:
            least.clamp_max_(0)
            scale = most.clamp_min_(0).sub_(least).div_(high - low).clamp_min_(_TINY)
            zero_point = least.div_(scale).neg_().add_(low).round_().clamp_(low, high)
        v.div_(scale).round_()
        if zero_point is not None:
            v.add_(zero_point)
        into.q.copy_(u.clamp_(low, high))
        if into.scale is not None:
            into.scale.copy_(scale.view(into.scale.shape))
        if into.zero_point is not None:
            into.zero_point.zero_() if zero_point is None else into.zero_point.copy_(zero_point.squeeze(-1))


class Rounded(NamedTuple):
    """q: [..., K] int8.   scale: fp32, if dynamic: [...], or [..., K / group_size] beside a zero_point, int32."""

    q: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None


# Kernel parts


@jit()
def round_static_tile(u, group_ptr, scale_ptr, zero_point_ptr, scale_groups, zero_point_groups, low, high):
    """Integers, as fp32."""
    scale = tl.load(scale_ptr + table_row_index(group_ptr, scale_groups))
    zero_point = tl.load(zero_point_ptr + table_row_index(group_ptr, zero_point_groups)).to(tl.float32)
    return _round_clamp(tl.div_rn(u, scale), low - zero_point, high - zero_point) + zero_point


@jit()
def round_dynamic_tile(u, low, high, SYMMETRIC: tl.constexpr):
    """u: [groups, channels], zero where masked.   Returns integers, as fp32, scales [groups], zero points [groups]."""
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    tiny = 1.1754943508222875e-38
    if SYMMETRIC:
        low = -high
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(u), axis=1), high), tiny)
        zero_point = tl.zeros_like(scale)
    else:
        least = tl.minimum(tl.min(u, axis=1), 0.0)
        scale = tl.maximum(tl.div_rn(tl.maximum(tl.max(u, axis=1), 0.0) - least, high - low), tiny)
        zero_point = _round_clamp(low - tl.div_rn(least, scale), low, high)
    shift = zero_point[:, None]
    q = _round_clamp(tl.div_rn(u, scale[:, None]), low - shift, high - shift) + shift
    return q, scale, zero_point


@jit()
def _round_clamp(v, low, high):
    """Round half to even inside [low, high], integers below 2^22 in size.

    Adding 1.5 * 2^23 leaves no bit for a fraction; it rounds as torch.round does, on the GPU and in the interpreter.
    """
    v = tl.minimum(tl.maximum(v, low), high)
    return (v + 12582912.0) - 12582912.0
