# SPDX-License-Identifier: Apache-2.0
import torch

from tiny_models.base import Inputs, TinyModel, add


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 4, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        timestep=torch.tensor([timestep, timestep]),
    )


add(
    TinyModel(
        "AuraFlowTransformer2DModel",
        dict(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=16,
        ),
        _inputs,
        (0.951, 0.499, 0.021),
    )
)
