# SPDX-License-Identifier: Apache-2.0
"""TFMQ-DM (Huang et al., CVPR 2024; arXiv 2311.16503): what depends on the timestep alone is treated apart.

The layers between timestep embedding and modulation see few inputs, one for each step: their weights are learned on
their own, before the blocks that read them, and their activation ranges are kept a step. In DiT those are the adaLN
linears; the embedders, small and shared by all blocks, stay in floating point here. The class or the prompt enters
them too, so the set of inputs is finite only up to that.
"""

from torch import Tensor

from diffusers_dq.methods.base import METHODS, Method, Site, token_or_tensor
from diffusers_dq.recipe import Recipe
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.timesteps import Boundaries, boundaries_of
from diffusers_dq.transforms import Chain


@METHODS.register("tfmq")
class TFMQ(Method):
    summary = (
        "Q-Diffusion with the temporal layers learned first, on their own, and their ranges kept a step (minutes)"
    )
    recipe = Recipe(search="mse", rounding="adaround")

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return token_or_tensor(bits, dynamic=False)

    @property
    def rounds_conditioning(self) -> bool:
        return True

    def range_boundaries(self, site: Site, chain: Chain, timesteps: Tensor) -> Boundaries:
        if site.transformable:
            return ()
        return boundaries_of(timesteps.sort().values, range(1, len(timesteps)))
