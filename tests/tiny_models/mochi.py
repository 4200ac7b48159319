# SPDX-License-Identifier: Apache-2.0
"""Video of width 48, text of width 96, and 4 tokens of it; the last two of the first sample are padding."""

import torch

from tiny_models.base import Inputs, TinyModel, add


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 4, 2, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(2, 4, 32, generator=generator),
        timestep=torch.tensor([timestep, timestep]),
        encoder_attention_mask=torch.tensor([[True, True, False, False], [True, True, True, True]]),
    )


add(
    TinyModel(
        "MochiTransformer3DModel",
        dict(
            num_attention_heads=3,
            attention_head_dim=16,
            num_layers=3,
            pooled_projection_dim=96,
            in_channels=4,
            text_embed_dim=32,
            time_embed_dim=32,
        ),
        _inputs,
        (0.0, 487.5, 975.0),
    )
)
