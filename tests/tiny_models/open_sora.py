# SPDX-License-Identifier: Apache-2.0
import torch

from diffusers_dq import opensora
from tiny_models.base import Inputs, TinyModel, add

SETTINGS = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, caption_channels=32, caption_length=5)


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 4, 3, 8, 8, generator=generator),
        timestep=torch.tensor([timestep, timestep]).long(),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    )


def _inputs_of_any_time(timestep: float, generator: torch.Generator) -> Inputs:
    return {**_inputs(timestep, generator), "timestep": torch.tensor(timestep), "fps": 24, "height": 64, "width": 64}


def _inputs_with_given_frames(timestep: float, generator: torch.Generator) -> Inputs:
    frame_mask = torch.tensor([[False, True, True], [True, False, True]])
    return {**_inputs_of_any_time(timestep, generator), "frame_mask": frame_mask}


add(TinyModel("STDiTTransformer3DModel", SETTINGS, _inputs, library=opensora))
add(TinyModel("STDiT3Transformer3DModel", SETTINGS, _inputs_of_any_time, library=opensora))
add(
    TinyModel(
        "STDiT3Transformer3DModel", SETTINGS, _inputs_with_given_frames, variant="given frames", library=opensora
    )
)
