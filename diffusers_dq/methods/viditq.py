# SPDX-License-Identifier: Apache-2.0
"""ViDiT-Q (Zhao et al., ICLR 2025): static-dynamic channel balancing, activations rounded a token at run time.

    u = (x / s) R,  W' = (W diag(s)) R

s takes out the imbalance of channels that is there at every step, the rotation R spreads what changes with the step.
Weights are rounded once, after both (the released code rounds them after each). The paper's W4A8 rows are mixed
precision besides: diffusers_dq/search allocates bits by metric, and without it this is the static-dynamic row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffusers_dq.balancing import ALPHAS, balance, check_alpha
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
from diffusers_dq.transforms import NOT_ROTATED, Chain, Rotate, Scale


@dataclass(frozen=True, kw_only=True)
class ViDiTQOptions(MethodOptions):
    """alpha: of s = max|x|^alpha / max|W|^(1 - alpha); None is searched for each site: of 0, 0.1, ... 1 the one with
        the least error of the output on sampled tokens. (The released code's alpha is 1 minus this one.)
    window: steps that max|x| is taken over: "all", or the "first", where the paper sees the static part best.
    rotate: False leaves the scaling alone.   full_width, seed: see QuaRot.
    online: also scale inputs that nothing upstream can carry, in the quantize step, which rotates all of them anyway.
    """

    alpha: float | None = None
    window: Literal["all", "first"] = "all"
    rotate: bool = True
    full_width: bool = False
    seed: int = 0
    online: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha(self.alpha)


@METHODS.register("viditq")
class ViDiTQ(Method):
    Options: ClassVar[type[MethodOptions]] = ViDiTQOptions
    summary = "static scaling, alpha searched a site, then a rotation; activations dynamic; bits can be allocated"
    options: ViDiTQOptions

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return token_or_tensor(bits, dynamic=True)

    def solve(self, sites: Sequence[Site], timesteps: Tensor | None) -> Solution:
        scaled = {site.name for site in sites_to_transform(sites, self.options.online)}
        chains, notes, options = {}, {}, self.options
        for site in sites:
            if site.transformable:
                channels = site.weights[0].shape[1]
                rotation = Rotate.random(channels, options.seed, options.full_width) if options.rotate else None
                chains[site.name] = self._balanced(site, rotation) if site.name in scaled else Chain(rotation=rotation)
                if options.rotate and rotation is None:
                    notes[site.name] = NOT_ROTATED
        return Solution(chains, notes)

    def _balanced(self, site: Site, rotation: Rotate | None) -> Chain:
        steps = site.input_max()
        input_max, weight_max = steps[0] if self.options.window == "first" else steps.amax(0), site.weight_max()

        def chain(alpha: float) -> Chain:
            return Chain((Scale(balance(input_max, weight_max, alpha)),), rotation=rotation)

        if self.options.alpha is not None:
            return chain(self.options.alpha)
        return min((chain(alpha) for alpha in ALPHAS), key=site.output_error)
