# SPDX-License-Identifier: Apache-2.0
"""Lumina-Image 2.0, with key and value heads shared by three query heads as published, and with one for each."""

import torch

from tiny_models.base import Inputs, TinyModel, add


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 4, 8, 8, generator=generator),
        timestep=torch.tensor([timestep, timestep]),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    )


for _kv_heads, _variant in ((1, ""), (3, "own_values")):
    add(
        TinyModel(
            "Lumina2Transformer2DModel",
            dict(
                sample_size=8,
                in_channels=4,
                hidden_size=48,
                num_layers=2,
                num_refiner_layers=2,
                num_attention_heads=3,
                num_kv_heads=_kv_heads,
                multiple_of=16,
                axes_dim_rope=(4, 6, 6),
                axes_lens=(32, 16, 16),
                cap_feat_dim=32,
            ),
            _inputs,
            timesteps=(0.03, 0.5, 0.97),
            variant=_variant,
        )
    )
