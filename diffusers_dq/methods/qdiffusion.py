# SPDX-License-Identifier: Apache-2.0
"""Q-Diffusion (Li et al., ICCV 2023; arXiv 2302.04304): ranges searched, rounding learned block by block, static.

Inputs of learning are those that calibration kept, at evenly spaced steps. Its split of shortcuts is for U-Nets and
has no counterpart in a transformer.
"""

from diffusers_dq.methods.base import METHODS, Method, token_or_tensor
from diffusers_dq.recipe import Recipe
from diffusers_dq.scheme import QuantScheme


@METHODS.register("qdiffusion")
class QDiffusion(Method):
    """Nothing is transformed: what it has is in its recipe."""

    summary = "ranges of least L2.4 error, weights by AdaRound block by block (minutes), static activations"
    recipe = Recipe(search="mse", rounding="adaround")

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return token_or_tensor(bits, dynamic=False)
