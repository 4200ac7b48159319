# SPDX-License-Identifier: Apache-2.0
"""HTG, Hierarchical Timestep Grouping (Ding et al., arXiv 2503.06930): static activations for every timestep.

Shift each channel to its middle, one shift a group of similar timesteps; scale channels by an average over the steps;
fold both into what comes before and after; then round, weights a channel and activations a tensor. Notation as in the
paper: T steps from T (noisiest) to 1, z_t the shift of a step, G groups, s the scale.

The recipe is not the paper's: it searches ranges by "mse" and corrects nothing (presets.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffusers_dq.balancing import balance
from diffusers_dq.methods.base import METHODS, Method, MethodOptions, Site, Solution, sites_to_transform
from diffusers_dq.recipe import Recipe
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.shifting import group_means, group_steps
from diffusers_dq.timesteps import Boundaries, Linkage, group_of
from diffusers_dq.transforms import Chain, Scale, Shift


@dataclass(frozen=True, kw_only=True)
class HTGOptions(MethodOptions):
    """groups: G; None is the paper's floor(T / 10), at least 1.
    linkage: how steps are grouped: "optimal" (exact, by dynamic programming) or the paper's Algorithm 1 with "ward",
        "average" or "centroid" distance.
    scope: "model", one partition for all layers, or "layer", one a layer as the equations read.
    ema: alpha of Eq. 7.   ema_steps: the T that alpha is meant for; with another T it becomes alpha^(ema_steps / T),
        so that the first step keeps its weight. None is the paper's literal form, the same alpha for every T.
    shift, scale: False leaves out that part, for the paper's ablations.
    ranges: "model", one activation range for all timesteps, or "group", one a timestep group.
    online: also transform inputs that nothing upstream can carry (fc2), in the quantize step; None does so only for
        an architecture of which no producer is known.
    """

    groups: int | None = None
    linkage: Linkage = "optimal"
    scope: Literal["model", "layer"] = "model"
    ema: float = 0.99
    ema_steps: int | None = 100
    shift: bool = True
    scale: bool = True
    ranges: Literal["model", "group"] = "model"
    online: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups is not None and self.groups < 1:
            raise ValueError(f"groups must be at least 1, got {self.groups}")
        if not 0 <= self.ema <= 1:
            raise ValueError(f"ema must be between 0 and 1, got {self.ema}")
        if self.ema_steps is not None and self.ema_steps < 1:
            raise ValueError(f"ema_steps must be at least 1 or None, got {self.ema_steps}")


@METHODS.register("htg")
class HTG(Method):
    Options: ClassVar[type[MethodOptions]] = HTGOptions
    summary = "hierarchical timestep grouping: static activations, shifted a timestep group and scaled a channel"
    recipe = Recipe(search="output", output_correction=True)
    options: HTGOptions

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return QuantScheme(bits=bits, granularity="tensor", symmetric=False)

    def range_boundaries(self, site: Site, chain: Chain, timesteps: Tensor) -> Boundaries:
        return chain.boundaries if self.options.ranges == "group" else ()

    def solve(self, sites: Sequence[Site], timesteps: Tensor | None) -> Solution:
        """Algorithm 2, steps 1 to 4, for every site; `timesteps` [T] in the order of denoising."""
        if timesteps is None:
            raise ValueError("htg needs statistics")
        changed = sites_to_transform(sites, self.options.online)
        options = self.options
        shifts = {site.name: site.midpoints() * float(options.shift) for site in changed}
        boundaries: dict[str, Boundaries] = dict.fromkeys(shifts, ())
        if options.shift:
            boundaries = group_steps(shifts, timesteps, options.groups, options.linkage, options.scope)
        chains = {
            site.name: self._chain(site, shifts[site.name], timesteps, boundaries[site.name]) for site in changed
        }
        return Solution(chains)

    def _chain(self, site: Site, z: Tensor, timesteps: Tensor, boundaries: Boundaries) -> Chain:
        group = group_of(timesteps, boundaries)  # [T]
        z_bar = group_means(z, timesteps, boundaries)  # [G, K]
        statistics = site.statistics
        assert statistics is not None
        high, low = statistics.maximum - z_bar[group], statistics.minimum - z_bar[group]
        magnitude = torch.maximum(high, -low)  # [T, K], max |X~_t|: exact, no second pass
        m = ema(magnitude, self._alpha(len(timesteps)))
        shift = (Shift(z_bar),) if self.options.shift else ()
        scale = (Scale(balance(m, site.weight_max())),) if self.options.scale else ()
        return Chain((*shift, *scale), boundaries)

    def _alpha(self, steps: int) -> float:
        reference = self.options.ema_steps
        return self.options.ema if reference is None else self.options.ema ** (reference / steps)


def ema(magnitude: Tensor, alpha: float) -> Tensor:
    """m_T = max |X~_T|,  m_t = alpha m_{t+1} + (1 - alpha) max |X~_t|; returns m_1   (Eq. 7).

    magnitude: [T, K] from noisiest to cleanest, absolute values (the paper prints max without the bars; after a shift
    by the group's mean a channel is no longer symmetric).
    """
    m = magnitude[0]
    for current in magnitude[1:]:
        m = alpha * m + (1 - alpha) * current
    return m
