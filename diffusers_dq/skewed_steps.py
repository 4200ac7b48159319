# SPDX-License-Identifier: Apache-2.0
"""Which steps to calibrate on, drawn from a skewed normal distribution (PTQ4DM, Shang et al., CVPR 2023)."""

import torch
from torch import Tensor


def draw_steps(timesteps: Tensor, mean: float, deviation: float, draws: int, seed: int) -> Tensor:
    """[S] bool: the steps that `draws` numbers from N(mean, deviation^2), clipped to the schedule, fall on.

    timesteps: [S], in the order of denoising, whether their values fall (most models) or rise.
    mean, deviation: in shares of the schedule, 0 its clean end and 1 its noisy one.
    """
    generator = torch.Generator().manual_seed(seed)
    shares = (mean + deviation * torch.randn(draws, generator=generator)).clamp(0, 1)
    last = len(timesteps) - 1
    drawn = torch.zeros(len(timesteps), dtype=torch.bool)
    drawn[last - (shares * last).round().long()] = True
    return drawn
