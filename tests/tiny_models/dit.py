# SPDX-License-Identifier: Apache-2.0
import torch

from tiny_models.base import Inputs, TinyModel, add


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 4, 8, 8, generator=generator),
        timestep=torch.tensor([timestep, timestep]).long(),
        class_labels=torch.tensor([1, 7]),
    )


add(
    TinyModel(
        "DiTTransformer2DModel",
        dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=8),
        _inputs,
    )
)
