# SPDX-License-Identifier: Apache-2.0
"""Two latent frames, 5 tokens of text: 1.0 with fixed positions, 1.5 (image to video) with rotary ones and "ofs"."""

import torch

from tiny_models.base import Inputs, TinyModel, add

SETTINGS = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=16,
    text_embed_dim=32,
    num_layers=2,
    sample_width=8,
    sample_height=8,
    sample_frames=5,
    max_text_seq_length=5,
)


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 2, 4, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        timestep=torch.tensor([timestep, timestep]).long(),
    )


def _later_inputs(timestep: float, generator: torch.Generator) -> Inputs:
    angles = torch.randn(16, 8, generator=generator).repeat_interleave(2, dim=1)
    return dict(
        _inputs(timestep, generator), ofs=torch.tensor([2.0, 2.0]), image_rotary_emb=(angles.cos(), angles.sin())
    )


NAME, TIMESTEPS = "CogVideoXTransformer3DModel", (999.0, 499.0, 19.0)
later = dict(
    patch_size_t=2,
    patch_bias=False,
    ofs_embed_dim=16,
    use_rotary_positional_embeddings=True,
)
add(TinyModel(NAME, SETTINGS, _inputs, TIMESTEPS))
add(TinyModel(NAME, {**SETTINGS, **later}, _later_inputs, TIMESTEPS, "1.5"))
