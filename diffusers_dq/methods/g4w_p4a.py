# SPDX-License-Identifier: Apache-2.0
"""G4W+P4A, Q-DiT's own baseline (Chen et al., CVPR 2025): GPTQ weights in groups, PTQ4DM's static activations.

A static range for each group of input channels needs no kernel of its own: shifting a group to its middle and scaling
it to the common size leaves one range for all, and a weight in the same groups takes the scale into its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_dq.methods.base import METHODS, Method, MethodOptions, Site, Solution, token_or_tensor
from diffusers_dq.recipe import Recipe
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.skewed_steps import draw_steps
from diffusers_dq.transforms import Chain, Scale, Shift


@dataclass(frozen=True, kw_only=True)
class G4WP4AOptions(MethodOptions):
    """mean, deviation, draws, seed: of the steps that activation ranges are found on; see PTQ4DM."""

    mean: float = 0.4
    deviation: float = 0.2
    draws: int = 64
    seed: int = 0


@METHODS.register("g4w_p4a")
class G4WP4A(Method):
    """Inputs that nothing upstream can carry are shifted and scaled in the quantize step."""

    Options: ClassVar[type[MethodOptions]] = G4WP4AOptions
    summary = "GPTQ weights in groups of 128, static activation ranges a group from steps drawn as in PTQ4DM"
    recipe = Recipe(group_size=128, rounding="gptq")
    options: G4WP4AOptions

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return token_or_tensor(bits, dynamic=False)

    def calibration_steps(self, timesteps: Tensor) -> Tensor:
        options = self.options
        return draw_steps(timesteps, options.mean, options.deviation, options.draws, options.seed)

    def solve(self, sites: Sequence[Site], timesteps: Tensor | None) -> Solution:
        return Solution({site.name: _chain(site) for site in sites if site.transformable and _group_size(site)})


def _group_size(site: Site) -> int:
    return max((scheme.group_size or 0 for scheme in site.weight_schemes if scheme is not None), default=0)


def _chain(site: Site) -> Chain:
    """Every group about zero and of the mean half range."""
    assert site.statistics is not None
    size = _group_size(site)
    low = site.statistics.minimum.amin(0).view(-1, size).amin(1)  # [K / g]
    high = site.statistics.maximum.amax(0).view(-1, size).amax(1)
    half = ((high - low) / 2).clamp(min=torch.finfo(low.dtype).tiny)
    middle, scale = ((high + low) / 2).repeat_interleave(size), (half / half.mean()).repeat_interleave(size)
    return Chain((Shift(middle[None]), Scale(scale)))
