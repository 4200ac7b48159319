# SPDX-License-Identifier: Apache-2.0
"""SVDQuant (Li et al., ICLR 2025; arXiv 2411.05007): outliers go into the weight, and there into a low-rank branch.

    u = x / s,  W' = W diag(s),  y = u D^T U^T + u^ (W' - U D)^^T + b

with U D the best approximation of W' of rank 32, kept in the precision of the model, and what is left rounded. The
paper's setting is DQConfig("svdquant", weight_bits=4, activation_bits=4). Its kernels fuse the branch into the integer
product; here it is two products of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffusers_dq.balancing import ALPHAS, balance, check_alpha
from diffusers_dq.methods.base import METHODS, Method, MethodOptions, Site, Solution, sites_to_transform
from diffusers_dq.recipe import Recipe
from diffusers_dq.scheme import QuantScheme, fitting_group
from diffusers_dq.transforms import Chain, Scale


@dataclass(frozen=True, kw_only=True)
class SVDQuantOptions(MethodOptions):
    """alpha: of s = max|x|^alpha / max|W|^(1 - alpha); None is searched a site, of 0, 0.1, ... 1 (as in ViDiT-Q).
    activations: "group", ranges of each group of each token (the paper's 64), or "token".
    online: also scale inputs that nothing upstream can carry, in the quantize step.
    """

    alpha: float | None = None
    activations: Literal["group", "token"] = "group"
    online: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha(self.alpha)


@METHODS.register("svdquant")
class SVDQuant(Method):
    Options: ClassVar[type[MethodOptions]] = SVDQuantOptions
    summary = "scaling, an unrounded branch of rank 32, the rest of the weight rounded in groups of 64; dynamic"
    recipe = Recipe(group_size=64, low_rank=32)
    options: SVDQuantOptions

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        size = fitting_group(in_features, group_size)
        if self.options.activations == "token" or size is None:
            return QuantScheme(bits=bits, granularity="token", dynamic=True)
        return QuantScheme(bits=bits, granularity="group", dynamic=True, group_size=size)

    def solve(self, sites: Sequence[Site], timesteps: Tensor | None) -> Solution:
        return Solution({site.name: self._chain(site) for site in sites_to_transform(sites, self.options.online)})

    def _chain(self, site: Site) -> Chain:
        largest, weight_max = site.input_max().amax(0), site.weight_max()
        alphas = ALPHAS if self.options.alpha is None else (self.options.alpha,)
        chains = [Chain((Scale(balance(largest, weight_max, alpha)),)) for alpha in alphas]
        return chains[0] if len(chains) == 1 else min(chains, key=site.output_error)
