# SPDX-License-Identifier: Apache-2.0
import torch

from tiny_models.base import Inputs, TinyModel, add


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 4, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        timestep=torch.tensor([timestep, timestep]).long(),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    )


add(
    TinyModel(
        "PixArtTransformer2DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=32,
            sample_size=8,
            caption_channels=32,
            use_additional_conditions=False,
        ),
        _inputs,
    )
)
