# SPDX-License-Identifier: Apache-2.0
"""Sana, and Sana-Sprint with guidance, norms of queries and keys, and timesteps from 0 to 1."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_SETTINGS = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    cross_attention_dim=32,
    caption_channels=32,
    sample_size=4,
)


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 4, 4, 4, generator=generator),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        timestep=torch.tensor([timestep, timestep]),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    )


def _sprint(timestep: float, generator: torch.Generator) -> Inputs:
    return {**_inputs(timestep, generator), "guidance": torch.tensor([0.45, 0.45])}


add(TinyModel("SanaTransformer2DModel", _SETTINGS, _inputs))
add(
    TinyModel(
        "SanaTransformer2DModel",
        dict(**_SETTINGS, guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        _sprint,
        timesteps=(1.0, 0.6, 0.05),
        variant="sprint",
    )
)
