# SPDX-License-Identifier: Apache-2.0
"""The transforms of all the papers in one chain, each of which can be left out: what the presets are made of.

    u = ((x - z_g) / s) R,   W' = (W diag(s)) R,   b'_g = b + z_g W^T

HTG's shift by timestep group centres each channel, ViDiT-Q's s takes out the imbalance that stays, QuaRot's rotation
spreads what is left. Activations are rounded a token at run time, or with static ranges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_dq.balancing import ALPHAS, balance
from diffusers_dq.methods.base import (
    METHODS,
    Method,
    MethodOptions,
    Site,
    Solution,
    sites_to_transform,
    token_or_tensor,
)
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.shifting import group_means, group_steps
from diffusers_dq.timesteps import Boundaries, group_of
from diffusers_dq.transforms import NOT_ROTATED, Chain, ChannelTransform, Rotate, Scale, Shift


@dataclass(frozen=True, kw_only=True)
class ComposedOptions(MethodOptions):
    """shift: take out the middle of each channel, one for each of `groups` timestep groups (see HTG; None is
        floor(S / 10) of S calibrated steps).
    scale: alpha of s = max|x - z|^alpha / max|W|^(1 - alpha), searched a site.   rotate, full_width, seed: see QuaRot.
    dynamic: activation scales a token at run time, else static ones a tensor.
    online: also shift and scale inputs that nothing upstream can carry, in the quantize step.
    """

    shift: bool = True
    groups: int | None = None
    scale: bool = True
    rotate: bool = True
    full_width: bool = False
    seed: int = 0
    dynamic: bool = True
    online: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups is not None and self.groups < 1:
            raise ValueError(f"groups must be at least 1, got {self.groups}")


@METHODS.register("composed")
class Composed(Method):
    Options: ClassVar[type[MethodOptions]] = ComposedOptions
    summary = (
        "shift by timestep group, scale, rotate, each optional; activations dynamic or static: the presets' method"
    )
    options: ComposedOptions

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return token_or_tensor(bits, self.options.dynamic)

    def solve(self, sites: Sequence[Site], timesteps: Tensor | None) -> Solution:
        if timesteps is None:
            raise ValueError("composed needs statistics")
        options = self.options
        changed = {site.name for site in sites_to_transform(sites, options.online)}
        shifts = {site.name: site.midpoints() for site in sites if options.shift and site.name in changed}
        boundaries = group_steps(shifts, timesteps, options.groups, "optimal", "model")
        chains, notes = {}, {}
        for site in sites:
            if not site.transformable:
                continue
            channels = site.weights[0].shape[1]
            rotation = Rotate.random(channels, options.seed, options.full_width) if options.rotate else None
            if options.rotate and rotation is None:
                notes[site.name] = NOT_ROTATED
            chains[site.name] = Chain(rotation=rotation)
            if site.name in changed:
                chains[site.name] = self._chain(site, timesteps, boundaries.get(site.name, ()), rotation)
        return Solution(chains, notes)

    def _chain(self, site: Site, timesteps: Tensor, boundaries: Boundaries, rotation: Rotate | None) -> Chain:
        assert site.statistics is not None
        low, high = site.statistics.minimum, site.statistics.maximum
        shift: tuple[ChannelTransform, ...] = ()
        if self.options.shift:
            z = group_means(site.midpoints(), timesteps, boundaries)
            shift = (Shift(z),)
            low, high = (bound - z[group_of(timesteps, boundaries)] for bound in (low, high))
        if not self.options.scale:
            return Chain(shift, boundaries, rotation)
        largest, weight_max = torch.maximum(high, -low).amax(0), site.weight_max()
        chains = [Chain((*shift, Scale(balance(largest, weight_max, a))), boundaries, rotation) for a in ALPHAS]
        return min(chains, key=lambda chain: site.output_error(chain, timesteps))
