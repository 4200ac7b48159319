# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant (Xiao et al., ICML 2023): one scale a channel moves part of the input's outliers into the weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffusers_dq.balancing import balance
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
from diffusers_dq.transforms import Chain, Scale


@dataclass(frozen=True, kw_only=True)
class SmoothQuantOptions(MethodOptions):
    """alpha: how much of the input's outliers the weight takes over, 0 to 1 (Eq. 4; the paper's 0.5).
    dynamic: activation scales a token at run time (the paper's O1), else static ones a tensor (O3).
    online: also scale inputs that nothing upstream can carry, in the quantize step; None does so only for an
        architecture of which no producer is known.
    """

    alpha: float = 0.5
    dynamic: bool = True
    online: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, got {self.alpha}")


@METHODS.register("smoothquant")
class SmoothQuant(Method):
    """Its s comes from the largest input over all calibrated steps: one for every timestep."""

    Options: ClassVar[type[MethodOptions]] = SmoothQuantOptions
    summary = "one scale a channel moves part of the activations' outliers into the weights"
    options: SmoothQuantOptions

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return token_or_tensor(bits, self.options.dynamic)

    def solve(self, sites: Sequence[Site], timesteps: Tensor | None) -> Solution:
        return Solution({site.name: self._chain(site) for site in sites_to_transform(sites, self.options.online)})

    def _chain(self, site: Site) -> Chain:
        largest = site.input_max().amax(0)  # [K]
        return Chain((Scale(balance(largest, site.weight_max(), self.options.alpha)),))
