# SPDX-License-Identifier: Apache-2.0
"""Hunyuan-DiT with six blocks: two before the middle, two after it with long skips. 1.2 has no size and style."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_SETTINGS = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    patch_size=2,
    sample_size=8,
    hidden_size=32,
    num_layers=6,
    cross_attention_dim=32,
    cross_attention_dim_t5=16,
    pooled_projection_dim=16,
    text_len=5,
    text_len_t5=4,
)


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    angles = torch.rand(16, 8, generator=generator).repeat_interleave(2, dim=1)
    return dict(
        hidden_states=torch.randn(2, 4, 8, 8, generator=generator),
        timestep=torch.tensor([timestep, timestep]),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        text_embedding_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        encoder_hidden_states_t5=torch.randn(2, 4, 16, generator=generator),
        text_embedding_mask_t5=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
        image_rotary_emb=(angles.cos(), angles.sin()),
    )


def _with_size(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        **_inputs(timestep, generator),
        image_meta_size=torch.tensor([[64, 64, 64, 64, 0, 0]] * 2),
        style=torch.tensor([0, 0]),
    )


add(TinyModel("HunyuanDiT2DModel", dict(**_SETTINGS, use_style_cond_and_image_meta_size=False), _inputs))
add(TinyModel("HunyuanDiT2DModel", _SETTINGS, _with_size, variant="size_and_style"))
