# SPDX-License-Identifier: Apache-2.0
"""As Wan's; with diffusion forcing each frame has a step of its own, the later the noisier."""

import torch

from tiny_models.base import Inputs, TinyModel, add
from tiny_models.wan import PICTURE, SETTINGS, TIMESTEPS, inputs, inputs_with_picture


def _forced(timestep: float, generator: torch.Generator) -> Inputs:
    steps = torch.tensor([[timestep / 2, timestep], [timestep / 4, timestep]])
    return dict(inputs(timestep, generator), timestep=steps, enable_diffusion_forcing=True)


def _forced_with_frame_rate(timestep: float, generator: torch.Generator) -> Inputs:
    """One video: the model cannot tell the frame rates of two apart from those of a video's frames."""
    one = {name: value[:1] for name, value in inputs(timestep, generator).items()}
    steps = torch.tensor([[timestep / 2, timestep]])
    return dict(one, timestep=steps, fps=[1], enable_diffusion_forcing=True)


NAME = "SkyReelsV2Transformer3DModel"
add(TinyModel(NAME, SETTINGS, inputs, TIMESTEPS))
add(TinyModel(NAME, {**SETTINGS, **PICTURE}, inputs_with_picture, TIMESTEPS, "picture"))
add(TinyModel(NAME, {**SETTINGS, "num_frame_per_block": 2}, _forced, TIMESTEPS, "forced"))
add(TinyModel(NAME, {**SETTINGS, "inject_sample_info": True}, _forced_with_frame_rate, TIMESTEPS, "frame_rate"))
