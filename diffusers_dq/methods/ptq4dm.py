# SPDX-License-Identifier: Apache-2.0
"""PTQ4DM (Shang et al., CVPR 2023; arXiv 2211.15736): static ranges, from steps nearer to the clean picture."""

from typing import ClassVar

from torch import Tensor

from diffusers_dq.methods.base import METHODS, DrawnSteps, Method, MethodOptions, token_or_tensor
from diffusers_dq.recipe import Recipe
from diffusers_dq.scheme import QuantScheme


@METHODS.register("ptq4dm")
class PTQ4DM(Method):
    Options: ClassVar[type[MethodOptions]] = DrawnSteps
    summary = "static ranges of least error, found on steps drawn nearer to the clean picture"
    recipe = Recipe(search="mse")
    options: DrawnSteps

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return token_or_tensor(bits, dynamic=False)

    def calibration_steps(self, timesteps: Tensor) -> Tensor:
        return self.options.of(timesteps)
