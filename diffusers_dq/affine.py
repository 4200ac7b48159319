# SPDX-License-Identifier: Apache-2.0
"""Scales, zero points and rounding: the only file of the package that rounds a tensor (the kernels have their own).

`q = clamp(round(x / scale) + zero_point, qmin, qmax)` and `x ~ (q - zero_point) scale`, round half to even.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusers_dq.scheme import QuantScheme

RangeSearch = Literal["minmax", "mse", "percentile", "output"]  # described in recipe.py

SHRINK_STEPS = 80  # Q-Diffusion tries the ranges 1.00, 0.99, ... 0.21 of the full one,
SHRINK_STEP = 0.01
ERROR_POWER = 2.4  # and keeps the one with the least L2.4 error
PERCENTILES = (0.999, 0.9999, 0.99999)  # of RepQ-ViT, which keeps the one with the least L2 error

_CACHED_VALUES = 1 << 18  # searched at once: 80 passes over what a core's cache holds, not over memory


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, scheme: QuantScheme) -> Tensor:
    """int8 of x's shape. scale, zero_point: broadcastable to x."""
    return torch.clamp(torch.round(x / scale) + zero_point, scheme.qmin, scheme.qmax).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | int = 0) -> Tensor:
    return (q.to(scale.dtype) - zero_point) * scale


def rounded(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """x^, of x's shape and dtype: `dequantize(quantize(x))` without the integers in between."""
    steps = (x / scale).round_()
    low, high = ((bound - zero_point).to(steps.dtype) for bound in (scheme.qmin, scheme.qmax))
    torch.minimum(steps, high, out=steps)  # with bounds that are tensors clamp_ takes several times as long
    return torch.maximum(steps, low, out=steps).mul_(scale)


def affine_parameters(low: Tensor, high: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """(scale fp32 > 0, zero_point int32) that cover [low, high], of low's shape.

    The range is widened to hold zero, so that zero is exact. A symmetric scheme covers the larger of the two sides.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    tiny = torch.finfo(torch.float32).tiny
    if scheme.symmetric:
        scale = (torch.maximum(-low, high) / scheme.qmax).clamp(min=tiny)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    scale = ((high - low) / (scheme.qmax - scheme.qmin)).clamp(min=tiny)
    zero_point = (scheme.qmin - torch.round(low / scale)).clamp(scheme.qmin, scheme.qmax)
    return scale, zero_point.to(torch.int32)


def rounded_dynamic(x: Tensor, scheme: QuantScheme) -> Tensor:
    """x^ of x [..., K] by ranges of its own: of each token, the whole tensor, or each group of channels of a token."""
    parts = x.unflatten(-1, (-1, scheme.group_size)) if scheme.group_size else x
    dims = tuple(range(x.ndim)) if scheme.granularity == "tensor" else (-1,)
    scale, zero_point = affine_parameters(parts.amin(dims, keepdim=True), parts.amax(dims, keepdim=True), scheme)
    return rounded(parts, scale, zero_point, scheme).view(x.shape)


def search_range(
    x: Tensor, low: Tensor, high: Tensor, scheme: QuantScheme, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) a row of x: of 80 shrunken ranges, the one of least sum_i |h_i (x_i - x^_i)|^2.4.

    x: [R, n] fp32, the values or a sample of them.   low, high: [R], the full range.   Returns [R] fp32, [R] int32.
    importance: h [n] or [R, n]; None is all ones, the search of Q-Diffusion.
    """
    rows = max(1, _CACHED_VALUES // max(1, x.shape[1]))
    h = None if importance is None else importance.expand_as(x)
    found = []
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        found.append(_search_rows(x[part], low[part], high[part], scheme, None if h is None else h[part]))
    scale, zero_point = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scale, zero_point


def _search_rows(
    x: Tensor, low: Tensor, high: Tensor, scheme: QuantScheme, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    best_error = torch.full_like(low, torch.inf, dtype=torch.float32)
    best_scale, best_zero = affine_parameters(low, high, scheme)
    for step in range(SHRINK_STEPS):
        shrink = 1 - SHRINK_STEP * step
        scale, zero_point = affine_parameters(low * shrink, high * shrink, scheme)
        difference = rounded(x, scale[:, None], zero_point[:, None], scheme).sub_(x)
        if importance is not None:
            difference *= importance
        error = difference.abs_().pow_(ERROR_POWER).sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero_point, best_zero)
    return best_scale, best_zero


def percentile_range(x: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """(scale [R] fp32, zero_point [R] int32) a row of x [R, n]: of the ranges between its quantiles 1 - p and p, p in
    PERCENTILES, the one of least squared error (RepQ-ViT, Li et al., ICCV 2023, as in its released code)."""
    ordered = x.float().sort(dim=1).values
    last = ordered.shape[1] - 1
    places = [round(last * p) for p in PERCENTILES]
    candidates = [affine_parameters(ordered[:, last - place], ordered[:, place], scheme) for place in places]
    errors = torch.stack(
        [(rounded(x.float(), s[:, None], z[:, None], scheme) - x).square().sum(1) for s, z in candidates]
    )
    best = errors.argmin(dim=0)[None]
    scale, zero_point = (torch.stack(parts).gather(0, best)[0] for parts in zip(*candidates, strict=True))
    return scale, zero_point


class QuantizedWeight(NamedTuple):
    """integers: [N, K] int8.   scale: [N] fp32, or [N, K / g] by group.   zero_point: [N, K / g] int8 or None."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None = None

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K]."""
        by_group = self.scale.ndim == 2
        q = self.integers.unflatten(1, (self.scale.shape[1], -1)) if by_group else self.integers
        zero_point = 0 if self.zero_point is None else self.zero_point[..., None]
        return dequantize(q, self.scale.to(dtype)[..., None], zero_point).view(self.integers.shape)


def weight_ranges(
    rows: Tensor, scheme: QuantScheme, search: RangeSearch, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(scale fp32, zero_point int32), [R] each, of rows [R, n] of a weight.   importance: [R, n], for "output"."""
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    if search == "minmax":
        return affine_parameters(low, high, scheme)
    if search == "percentile":
        return percentile_range(rows, scheme)
    return search_range(rows, low, high, scheme, importance if search == "output" else None)


def quantize_weight(
    weight: Tensor, scheme: QuantScheme, search: RangeSearch = "minmax", importance: Tensor | None = None
) -> QuantizedWeight:
    """Round a weight [N, K] to nearest, each output channel or each group of its input channels by its own range.

    importance: [K], of a column's error, for search="output".
    Raises ValueError where the group size does not divide K.
    """
    n, k = weight.shape
    size = scheme.group_size or k
    if k % size:
        raise ValueError(f"group_size must divide the {k} in_features, got {size}")
    parts = weight.float().reshape(-1, size)  # [N K / g, g]
    if importance is not None:
        importance = importance.to(parts).view(1, -1, size).expand(n, -1, -1).reshape(-1, size)
    scale, zero_point = weight_ranges(parts, scheme, search, importance)
    q = quantize(parts, scale[:, None], zero_point[:, None], scheme).view(n, k)
    if scheme.granularity != "group":
        return QuantizedWeight(q, scale)
    scale, zero_point = scale.view(n, -1), zero_point.view(n, -1)
    return QuantizedWeight(q, scale, None if scheme.symmetric else zero_point.to(torch.int8))
