# SPDX-License-Identifier: Apache-2.0
"""SD3 without norms of queries and keys; SD3.5 with them and a second attention in the first block."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_SETTINGS = dict(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    caption_projection_dim=32,
    pooled_projection_dim=32,
    pos_embed_max_size=8,
)


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 4, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        pooled_projections=torch.randn(2, 32, generator=generator),
        timestep=torch.tensor([timestep, timestep]),
    )


add(TinyModel("SD3Transformer2DModel", _SETTINGS, _inputs))
add(
    TinyModel(
        "SD3Transformer2DModel",
        {**_SETTINGS, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
        _inputs,
        variant="dual",
    )
)
