# SPDX-License-Identifier: Apache-2.0
"""Latte over three frames of 16 patches, its two samples at one timestep."""

import torch

from tiny_models.base import Inputs, TinyModel, add


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 4, 3, 8, 8, generator=generator),
        timestep=torch.tensor([timestep, timestep]).long(),
        encoder_hidden_states=torch.randn(2, 5, 16, generator=generator),
    )


add(
    TinyModel(
        "LatteTransformer3DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=16,
            video_length=3,
        ),
        _inputs,
    )
)
