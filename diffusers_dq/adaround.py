# SPDX-License-Identifier: Apache-2.0
"""AdaRound (Nagel et al., ICML 2020; arXiv 2004.10568): whether a weight is rounded up or down is learned.

Notation: W [N, K] the weight, s and z its scale and zero point, V [N, K] what is learned, h(V) in [0, 1] the choice.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusers_dq.affine import QuantizedWeight, rounded_dynamic
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.scheme import QuantScheme

GAMMA, ZETA = -0.1, 1.1  # h is a sigmoid stretched to [GAMMA, ZETA] and clipped (Eq. 23)


class SoftLinear(nn.Module):
    """A quantized layer while its rounding is learned: the same function of its input, differentiable.

    y = u^ W^^T + b_g with W^ = s (clamp(floor(W / s + z) + h(V)) - z), u^ the rounded transform of x. Gradients pass
    the rounding of u as if it were not there. A static input scale is learned too, by a factor for all its rows.
    """

    def __init__(
        self, layer: QuantizedLinear, exact: Tensor, scheme: QuantScheme, input_scheme: QuantScheme | None
    ) -> None:
        """layer: built from the plan, read only.   exact: [N, K], the folded weight.   scheme: of the weight."""
        super().__init__()
        self._layer = (layer,)  # in a tuple: no submodule
        self.scheme, self.input_scheme = scheme, input_scheme
        assert layer.weight_scale is not None
        groups = layer.weight_scale.reshape(len(exact), -1)  # [N, K / g]
        size = exact.shape[1] // groups.shape[1]
        scale = groups.repeat_interleave(size, dim=1)
        zero_point = torch.zeros_like(scale)
        if layer.weight_zero_point is not None:
            zero_point = layer.weight_zero_point.float().repeat_interleave(size, dim=1)
        ratio = exact.float() / scale + zero_point
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("zero_point", zero_point, persistent=False)
        self.register_buffer("floor", ratio.floor(), persistent=False)
        fraction = (ratio - ratio.floor()).clamp(1e-4, 1 - 1e-4)
        self.v = nn.Parameter(-torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1))
        self.log_input_scale = nn.Parameter(torch.zeros((), device=exact.device))
        self.reached = False  # by a gradient of the error: some models run some linears without

    scale: Tensor
    zero_point: Tensor
    floor: Tensor

    @property
    def layer(self) -> QuantizedLinear:
        return self._layer[0]

    def up(self) -> Tensor:
        """h(V), [N, K] in [0, 1]   (Eq. 23)."""
        return (torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def undecided(self, beta: float) -> Tensor:
        """sum 1 - |2 h(V) - 1|^beta: zero once every weight is rounded one way   (Eq. 24)."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        self.reached = self.reached or torch.is_grad_enabled()
        u = layer.transformed(x).float()
        if self.input_scheme is not None and layer.rounds_input:
            u = self._rounded(u, replace(self.input_scheme, bits=layer.activation_bits))
        integers = (self.floor + self.up()).clamp(self.scheme.qmin, self.scheme.qmax)
        y = F.linear(u, (integers - self.zero_point) * self.scale, layer.bias_row()).to(x.dtype)
        return y if layer.low_rank_down is None else y + layer.low_rank_part(x)

    def _rounded(self, u: Tensor, scheme: QuantScheme) -> Tensor:
        if scheme.dynamic:
            return u + (rounded_dynamic(u.detach(), scheme) - u).detach()
        scale, zero_point = self.layer.range_row()
        scale = scale * self.log_input_scale.exp()
        ratio = u / scale
        q = (ratio + (ratio.round() - ratio).detach() + zero_point).clamp(scheme.qmin, scheme.qmax)
        return (q - zero_point) * scale

    def nearest(self) -> QuantizedWeight:
        """As it was rounded before anything was learned."""
        assert self.layer.weight_scale is not None
        return QuantizedWeight(self.layer.integer_weight(), self.layer.weight_scale, self.layer.weight_zero_point)

    @torch.no_grad()
    def decided(self) -> QuantizedWeight:
        """Every weight rounded the way that h(V) leans."""
        q = (self.floor + (self.v >= 0)).clamp(self.scheme.qmin, self.scheme.qmax).to(torch.int8)
        assert self.layer.weight_scale is not None
        return QuantizedWeight(q, self.layer.weight_scale, self.layer.weight_zero_point)


def annealed(step: int, steps: int, warmup: float, start: float, end: float) -> float | None:
    """beta of a step, falling from start to end once the warm-up is over; None before, when nothing is pressed."""
    first = warmup * steps
    if step < first:
        return None
    return end + (start - end) * max(0.0, 1 - (step - first) / (steps - first))


def cosine(step: int, steps: int) -> float:
    """From 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
