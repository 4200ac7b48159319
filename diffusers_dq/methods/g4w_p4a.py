# SPDX-License-Identifier: Apache-2.0
"""G4W+P4A, Q-DiT's own baseline (Chen et al., CVPR 2025): GPTQ weights in groups, PTQ4DM's static activations.

A static range for each group of input channels needs no kernel of its own: shifting a group to its middle and scaling
it to the common size leaves one range for all, and a weight in the same groups takes the scale into its own.
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from diffusers_dq.methods.base import METHODS, DrawnSteps, Method, MethodOptions, Site, Solution, token_or_tensor
from diffusers_dq.recipe import Recipe
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.transforms import Chain, Scale, Shift

SMALLEST = 1e-4  # of the mean half range: a group that never changes must not be blown up beyond fp16


@METHODS.register("g4w_p4a")
class G4WP4A(Method):
    """Inputs that nothing upstream can carry are shifted and scaled in the quantize step."""

    Options: ClassVar[type[MethodOptions]] = DrawnSteps
    summary = "GPTQ weights in groups of 128, static activation ranges a group from steps drawn as in PTQ4DM"
    recipe = Recipe(group_size=128, rounding="gptq")
    options: DrawnSteps

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return token_or_tensor(bits, dynamic=False)

    def calibration_steps(self, timesteps: Tensor) -> Tensor:
        return self.options.of(timesteps)

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
    half = (high - low) / 2
    mean = float(half.mean()) or 1.0
    scale = (half / mean).clamp(min=SMALLEST).repeat_interleave(size)
    return Chain((Shift(((high + low) / 2).repeat_interleave(size)[None]), Scale(scale)))
