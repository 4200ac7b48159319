# SPDX-License-Identifier: Apache-2.0
"""PTQ4DM (Shang et al., CVPR 2023; arXiv 2211.15736): static ranges, from steps nearer to the clean picture."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffusers_dq.methods.base import METHODS, Method, MethodOptions, token_or_tensor
from diffusers_dq.recipe import Recipe
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.skewed_steps import draw_steps


@dataclass(frozen=True, kw_only=True)
class PTQ4DMOptions(MethodOptions):
    """mean, deviation: of the normal distribution that calibration steps are drawn from, in shares of the schedule, 0
        the clean end. The paper's mean is below one half; the deviation is ours.
    draws, seed: how many are drawn, and from which random numbers. Steps count once, however often they are drawn.
    """

    mean: float = 0.4
    deviation: float = 0.2
    draws: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mean <= 1 or self.deviation <= 0 or self.draws < 1:
            raise ValueError(
                "mean must be in [0, 1], deviation above 0 and draws at least 1, got"
                f" {self.mean}, {self.deviation} and {self.draws}"
            )


@METHODS.register("ptq4dm")
class PTQ4DM(Method):
    Options: ClassVar[type[MethodOptions]] = PTQ4DMOptions
    summary = "static ranges of least error, found on steps drawn nearer to the clean picture"
    recipe = Recipe(search="mse")
    options: PTQ4DMOptions

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return token_or_tensor(bits, dynamic=False)

    def calibration_steps(self, timesteps: Tensor) -> Tensor:
        options = self.options
        return draw_steps(timesteps, options.mean, options.deviation, options.draws, options.seed)
