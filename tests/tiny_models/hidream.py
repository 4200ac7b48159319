# SPDX-License-Identifier: Apache-2.0
"""With four experts, two a token, as published, and without any."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_SETTINGS = dict(
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    caption_channels=[32, 48],
    text_emb_dim=32,
    num_routed_experts=4,
    num_activated_experts=2,
    axes_dims_rope=(8, 4, 4),
    max_resolution=(16, 16),
    llama_layers=[0, 1, 1, 2],
)


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 4, 8, 8, generator=generator),
        timesteps=torch.tensor([timestep, timestep]),
        encoder_hidden_states_t5=torch.randn(2, 5, 32, generator=generator),
        encoder_hidden_states_llama3=torch.randn(3, 2, 5, 48, generator=generator),
        pooled_embeds=torch.randn(2, 32, generator=generator),
    )


add(TinyModel("HiDreamImageTransformer2DModel", _SETTINGS, _inputs))
add(TinyModel("HiDreamImageTransformer2DModel", {**_SETTINGS, "num_routed_experts": 0}, _inputs, variant="dense"))
