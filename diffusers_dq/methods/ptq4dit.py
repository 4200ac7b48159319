# SPDX-License-Identifier: Apache-2.0
"""PTQ4DiT (Wu et al., NeurIPS 2024): channels of input and weight balanced, timesteps weighed by where it helps.

The paper's balancing (sections 4.1 and 4.2), with ranges searched as in Q-Diffusion. Its released code also learns the
rounding block by block, which carries its W4A8 results: rounding="adaround", as in preset="paper".

Notation as in the paper: rho_t the correlation of the two saliences at step t, eta_t the weight of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffusers_dq.balancing import balance, spearman
from diffusers_dq.methods.base import METHODS, Method, MethodOptions, Site, Solution, sites_to_transform
from diffusers_dq.recipe import Recipe
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.transforms import Chain, Scale


@dataclass(frozen=True, kw_only=True)
class PTQ4DiTOptions(MethodOptions):
    """calibrate_salience: weigh timesteps by Spearman's rho (SSC, the paper's section 4.2); False takes the largest
        input over all steps, which is CSB alone.
    per_sample: of each kept sample, not of each timestep, are the salience and the weight in that sum taken: what the
        released code does, with the samples of one batch.
    online: also balance inputs that nothing upstream can carry (fc2), in the quantize step; None does so only for an
        architecture of which no producer is known.
    """

    calibrate_salience: bool = True
    per_sample: bool = False
    online: bool | None = None


@METHODS.register("ptq4dit")
class PTQ4DiT(Method):
    Options: ClassVar[type[MethodOptions]] = PTQ4DiTOptions
    summary = "channel-wise salience balancing, timesteps weighed by where it helps; static activations"
    recipe = Recipe(search="mse")
    options: PTQ4DiTOptions

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return QuantScheme(bits=bits, granularity="tensor", symmetric=False)

    def solve(self, sites: Sequence[Site], timesteps: Tensor | None) -> Solution:
        return Solution({site.name: self._chain(site) for site in sites_to_transform(sites, self.options.online)})

    def _chain(self, site: Site) -> Chain:
        weight_max = site.weight_max()
        input_max = site.sample_max() if self.options.per_sample else site.input_max()
        salience = salience_over_steps(input_max, weight_max) if self.options.calibrate_salience else input_max.amax(0)
        return Chain((Scale(balance(salience, weight_max)),))


def salience_over_steps(input_max: Tensor, weight_max: Tensor) -> Tensor:
    """s_rho = sum_t eta_t max|X_t|, eta = softmax_t(-rho_t): a step counts by how little input and weight agree.

    input_max: [S, K], of each step or sample.   weight_max: [K].   Returns [K].   rho_t = Spearman(input_max_t,
    weight_max).
    """
    eta = (-spearman(input_max, weight_max)).softmax(0)
    return (eta[:, None] * input_max.double()).sum(0).to(input_max.dtype)
