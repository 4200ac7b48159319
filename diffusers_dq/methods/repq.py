# SPDX-License-Identifier: Apache-2.0
"""RepQ-ViT (Li et al., ICCV 2023; arXiv 2212.08254): found a channel, run a tensor.

Activations have a scale d and zero point z for every channel while they are calibrated; then both are made the same
for all, by a change of what produces them and of the weight that reads them. With d~ and z~ the means over channels,

    u = (x + d (z - z~)) d~ / d   has in every channel the scale d~ and the zero point z~   (Eq. 9 to 12)

As RepQ* in PTQ4DiT and HTG it is calibrated over all timesteps. With quantize_attention=True probabilities are rounded
to powers of sqrt(1/2) (Eq. 13 to 15), for which there is no kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_dq.methods.base import (
    METHODS,
    Method,
    MethodOptions,
    Site,
    Solution,
    sites_to_transform,
    token_or_tensor,
)
from diffusers_dq.recipe import Recipe
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.transforms import Chain, Scale, Shift

SMALLEST = 1e-4  # of the mean scale: a channel that is always zero must not be blown up beyond fp16


@dataclass(frozen=True, kw_only=True)
class RepQOptions(MethodOptions):
    """online: also change inputs that nothing upstream can carry, in the quantize step; the paper changes only what
    comes out of a norm. None does so only for an architecture of which no producer is known.
    """

    online: bool | None = None


@METHODS.register("repq")
class RepQ(Method):
    Options: ClassVar[type[MethodOptions]] = RepQOptions
    summary = "scales and zero points found a channel, made equal by reparametrisation; static activations"
    recipe = Recipe(search="percentile")
    softmax = "log_sqrt2"
    options: RepQOptions

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return token_or_tensor(bits, dynamic=False)

    def solve(self, sites: Sequence[Site], timesteps: Tensor | None) -> Solution:
        return Solution({site.name: _chain(site) for site in sites_to_transform(sites, self.options.online)})


def _chain(site: Site) -> Chain:
    """Ranges of channels from the extremes of all tokens, with zero points that need not be integers here; the planner
    finds the range of the tensor, on u. (The paper's percentiles need more tokens than calibration keeps.)"""
    assert site.statistics is not None
    scheme = site.scheme or QuantScheme(bits=8, granularity="tensor", symmetric=False)
    low, high = site.statistics.minimum.amin(0), site.statistics.maximum.amax(0)
    scale = (high - low) / (scheme.qmax - scheme.qmin)
    scale = scale.clamp(min=max(SMALLEST * float(scale.mean()), torch.finfo(scale.dtype).tiny))
    zero = scheme.qmin - low / scale
    return Chain((Shift((scale * (zero.mean() - zero))[None]), Scale(scale / scale.mean())))
