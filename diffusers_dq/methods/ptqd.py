# SPDX-License-Identifier: Apache-2.0
"""PTQD (He et al., NeurIPS 2023; arXiv 2305.10657): the noise that rounding adds to predictions, fitted and taken out.

An addition to any method, as noise_correction=True; under its own name it goes with static ranges of least error. What
it takes off a stochastic sampler's noise is dq.PTQDScheduler's. Its choice of bits by step is step_bits.
"""

from diffusers_dq.methods.base import METHODS, Method, token_or_tensor
from diffusers_dq.recipe import Recipe
from diffusers_dq.scheme import QuantScheme


@METHODS.register("ptqd")
class PTQD(Method):
    summary = "static ranges of least error, and a correction of the predicted noise by step"
    recipe = Recipe(search="mse", noise_correction=True)

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return token_or_tensor(bits, dynamic=False)
