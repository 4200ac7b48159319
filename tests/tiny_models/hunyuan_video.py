# SPDX-License-Identifier: Apache-2.0
"""Two frames of 4 by 4 tokens and 5 tokens of text, the last two of the first sample padding."""

import torch

from tiny_models.base import Inputs, TinyModel, add

SETTINGS = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=1,
    text_embed_dim=32,
    pooled_projection_dim=32,
    rope_axes_dim=(4, 4, 8),
)


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 4, 2, 8, 8, generator=generator),
        timestep=torch.tensor([timestep, timestep]),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        pooled_projections=torch.randn(2, 32, generator=generator),
    )


def _guided(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(_inputs(timestep, generator), guidance=torch.tensor([6000.0, 6000.0]))


NAME, TIMESTEPS = "HunyuanVideoTransformer3DModel", (1000.0, 500.0, 20.0)
add(TinyModel(NAME, SETTINGS, _guided, TIMESTEPS))
replacing = {"guidance_embeds": False, "image_condition_type": "token_replace"}
add(TinyModel(NAME, {**SETTINGS, **replacing}, _inputs, TIMESTEPS, "token_replace"))
