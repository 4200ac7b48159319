# SPDX-License-Identifier: Apache-2.0
"""What quantize ops should return, computed in fp64 and by other code, and how far fp32 may stray from it.

A `Bounded` is a value with a bound on the error that fp32 makes in it, whatever the order of its sums. The bounds are
those of any textbook on rounding errors: each operation adds 2^-24 of its result, a sum of n terms (n - 1) 2^-24 of
the sum of their absolute values.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_dq_kernels._input_transform import InputTransform
from diffusers_dq_kernels._producers import Gelu, Norm
from diffusers_dq_kernels._quantize_rows import Plan
from diffusers_dq_kernels._rounding import Rounding
from diffusers_dq_kernels.hadamard import hadamard_matrix

E = 2.0**-24


class Bounded(NamedTuple):
    """value: fp64.   error: at least what any of the forms in fp32 is away from it."""

    value: Tensor
    error: Tensor

    def times(self, factor: Any) -> "Bounded":
        value = self.value * factor
        return Bounded(value, self.error * abs(factor) + 3 * E * value.abs())

    def plus(self, other: Any) -> "Bounded":
        value = self.value + other
        return Bounded(value, self.error + E * (value.abs() + self.error))


def exact_input(h: Tensor, plan: Plan) -> Bounded:
    """x, before the input transform."""
    x = Bounded(h.float().double(), torch.zeros(h.shape, dtype=torch.float64))
    if isinstance(plan.producer, Norm):
        return _norm(x.value, plan.producer)
    if isinstance(plan.producer, Gelu):
        v = x.value
        # The slope of v sigmoid(z(v)) in z is at most 0.23 v, where z takes five roundings of at most |z| each; an exp
        # on a GPU is good to 2^-22.
        y = 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
        return Bounded(y, 8 * E * v.abs())
    return x


def exact_transform(x: Bounded, t: InputTransform) -> Bounded:
    """u, from x."""
    g = int(t.group)
    if t.shift is not None:
        x = x.plus(-t.shift[min(g, len(t.shift) - 1)].double())
    if t.inv_smooth is not None:
        x = x.times(t.inv_smooth.double())
    if t.rotation_signs is None:
        return x
    n = t.rotation_order
    value = (x.value * t.rotation_signs.double()).unflatten(-1, (-1, n))
    total = (value.abs() * (n + 16) * E + x.error.unflatten(-1, (-1, n))).sum(-1, keepdim=True)
    rotated = value @ hadamard_matrix(n) / math.sqrt(n)
    return Bounded(rotated.flatten(-2), (total / math.sqrt(n)).expand_as(rotated).flatten(-2))


def check_rounded(rounded: tuple[Tensor, ...], u: Bounded, r: Rounding, group: Tensor) -> None:
    """Assert that every integer is the nearest one to u / scale, or as near to it as the error of u leaves open."""
    q, low, high = rounded[0], *r.limits
    assert q.dtype == torch.int8 and q.shape == u.value.shape and q.is_contiguous()
    g, k = int(group), u.value.shape[-1]
    if r.scale is not None and r.zero_point is not None:
        scale, zero_point = (t[min(g, len(t) - 1)].double() for t in (r.scale, r.zero_point))
        _check_integers(q, u.value, u.error, scale, zero_point, low, high)
        return
    size = r.group_size or k
    value, error = (t.unflatten(-1, (-1, size)) for t in u)
    scale = rounded[1].double().reshape(value.shape[:-1])
    zero_point = torch.zeros_like(scale) if r.group_size is None else rounded[2].double()
    most_error = error.amax(-1)
    if r.symmetric:
        steps, width = high, value.abs().amax(-1)
        assert (zero_point == 0).all()
        low = -high
    else:
        least, most = value.amin(-1).clamp_max(0), value.amax(-1).clamp_min(0)
        steps, width = high - low, most - least
        # -least / scale is at most the number of steps, and so are its three roundings.
        doubt = (2 * most_error + 8 * E * width) / scale
        assert ((zero_point - (low - least / scale).clamp(low, high)).abs() <= 0.5 + doubt).all()
        assert (zero_point == zero_point.round()).all()
    expected = (width / steps).clamp_min(torch.finfo(torch.float32).tiny)
    assert ((scale - expected).abs() <= (2 * most_error + 4 * E * width) / steps).all()
    assert rounded[1].dtype == torch.float32
    _check_integers(q.view(value.shape), value, error, scale[..., None], zero_point[..., None], low, high)


def _check_integers(
    q: Tensor, value: Tensor, error: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int
) -> None:
    wanted = value / scale + zero_point
    # u / scale rounds once, by 2^-24 of at most 2^9 steps: beyond that it is clamped anyway.
    off = (q.double() - wanted.clamp(low, high)).abs() - error / scale
    assert (off <= 0.5 + 2**-15).all()


def _norm(h: Tensor, n: Norm) -> Bounded:
    k = h.shape[-1]
    centred = h - h.mean(-1, keepdim=True) if n.kind == "layer" else h
    sigma = (centred.square().mean(-1, keepdim=True) + n.eps).sqrt()
    value = centred / sigma
    # The mean is off by at most (k - 1) E max|h|, and each difference rounds; the root of the deviations' mean square
    # moves no more than they do; it is that of a sum of k squares, and two products follow.
    mean = (k + 2) * E * h.abs().amax(-1, keepdim=True) / sigma if n.kind == "layer" else 0.0
    x = Bounded(value, mean + value.abs() * (mean + (k + 12) * E))
    if n.weight is not None:
        x = x.times(n.weight.double())
    if n.bias is not None:
        x = x.plus(n.bias.double())
    if n.modulation_scale is not None:
        x = x.times(1 + _each_row(n.modulation_scale, h))
    if n.modulation_shift is not None:
        x = x.plus(_each_row(n.modulation_shift, h))
    return x


def _each_row(table: Tensor, h: Tensor) -> Tensor:
    """[R, K] to the shape of h: row m takes m // (M / R)."""
    m = h.numel() // h.shape[-1]
    index = torch.arange(m) // (m // len(table))
    return table.double()[index].reshape(h.shape)
