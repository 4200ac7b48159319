# SPDX-License-Identifier: Apache-2.0
"""Allegro over two frames of 16 patches, with its rotary embeddings."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_AXES = (2, 4, 4)  # patches in time, height and width


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    angles = [torch.rand(length, 4, generator=generator).repeat(1, 2) for length in _AXES]  # a third of 24 channels
    positions = torch.cartesian_prod(*map(torch.arange, _AXES)).T.reshape(3, 1, -1)
    return dict(
        hidden_states=torch.randn(2, 4, 2, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(2, 5, 16, generator=generator),
        timestep=torch.tensor([timestep, timestep]),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        image_rotary_emb=(tuple((a.cos(), a.sin()) for a in angles), tuple(positions)),
    )


add(
    TinyModel(
        "AllegroTransformer3DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=48,
            sample_height=8,
            sample_width=8,
            sample_frames=2,
            caption_channels=16,
        ),
        _inputs,
    )
)
