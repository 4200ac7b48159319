# SPDX-License-Identifier: Apache-2.0
"""Schnell has no guidance, dev embeds it."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_SETTINGS = dict(
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=32,
    axes_dims_rope=(4, 4, 8),
)


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 16, 16, generator=generator),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        pooled_projections=torch.randn(2, 32, generator=generator),
        timestep=torch.tensor([timestep, timestep]),
        img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        txt_ids=torch.zeros(5, 3),
    )


def _guided(timestep: float, generator: torch.Generator) -> Inputs:
    return {**_inputs(timestep, generator), "guidance": torch.tensor([3.5, 3.5])}


TIMESTEPS = (0.951, 0.499, 0.021)
add(TinyModel("FluxTransformer2DModel", _SETTINGS, _inputs, TIMESTEPS))
add(TinyModel("FluxTransformer2DModel", {**_SETTINGS, "guidance_embeds": True}, _guided, TIMESTEPS, "guidance"))
