# SPDX-License-Identifier: Apache-2.0
"""AWQ (Lin et al., MLSys 2024; arXiv 2306.00978): weights alone are rounded, channels that matter scaled up before.

DQConfig("awq", weight_bits=4, activation_bits=16) is the paper's setting. Its search for a clipping of each group is
the recipe's search="output", off by default as a part of its own.
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
from diffusers_dq.transforms import Chain, Scale

ALPHAS = tuple(i / 20 for i in range(20))


@dataclass(frozen=True, kw_only=True)
class AWQOptions(MethodOptions):
    """online: also scale inputs that nothing upstream can carry (fc2), in the quantize step; None does so only for an
    architecture of which no producer is known.
    """

    online: bool | None = None


@METHODS.register("awq")
class AWQ(Method):
    """An activation is rounded only where activation_bits asks for it: then a token, at run time."""

    Options: ClassVar[type[MethodOptions]] = AWQOptions
    summary = "weight-only: channels scaled by the mean size of their input, to a power searched a site; groups of 128"
    recipe = Recipe(group_size=128)
    options: AWQOptions

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return token_or_tensor(bits, dynamic=True)

    def solve(self, sites: Sequence[Site], timesteps: Tensor | None) -> Solution:
        return Solution({site.name: self._chain(site) for site in sites_to_transform(sites, self.options.online)})

    def _chain(self, site: Site) -> Chain:
        size = site.tokens().abs().mean((0, 1))
        return min((Chain((Scale(importance(size, alpha)),)) for alpha in ALPHAS), key=site.output_error)


def importance(size: Tensor, alpha: float) -> Tensor:
    """s_k = size_k^alpha, by which the weight is multiplied and the input divided (Eq. 4, 5), up to a common factor.

    size: [K], mean |x_k|.   Returns [K], > 0; the geometric mean of its extremes is 1, as in the released code. A
    channel smaller than 1e-4 of the largest counts as that.
    """
    largest = size.max()
    s = torch.where(largest > 0, size / largest, torch.ones_like(size)).clamp(min=1e-4) ** alpha
    return s / (s.max() * s.min()).sqrt()
