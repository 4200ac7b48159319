# SPDX-License-Identifier: Apache-2.0
"""FLUX.2 dev embeds guidance, Klein does not; with references (Klein KV) each token has its modulation."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_SETTINGS = dict(
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    timestep_guidance_channels=32,
    axes_dims_rope=(4, 4, 4, 4),
)


def _klein(timestep: float, generator: torch.Generator) -> Inputs:
    line = torch.zeros(1)
    return dict(
        hidden_states=torch.randn(2, 16, 16, generator=generator),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        timestep=torch.tensor([timestep, timestep]),
        img_ids=torch.cartesian_prod(line, torch.arange(4.0), torch.arange(4.0), line),
        txt_ids=torch.cartesian_prod(line, line, line, torch.arange(5.0)),
    )


def _dev(timestep: float, generator: torch.Generator) -> Inputs:
    return {**_klein(timestep, generator), "guidance": torch.tensor([3.5, 3.5])}


def _with_references(timestep: float, generator: torch.Generator) -> Inputs:
    return {**_klein(timestep, generator), "kv_cache_mode": "extract", "num_ref_tokens": 8}


_TIMESTEPS = (0.951, 0.499, 0.021)
_WITHOUT_GUIDANCE = {**_SETTINGS, "guidance_embeds": False}
add(TinyModel("Flux2Transformer2DModel", _SETTINGS, _dev, _TIMESTEPS))
add(TinyModel("Flux2Transformer2DModel", _WITHOUT_GUIDANCE, _klein, _TIMESTEPS, "klein"))
add(TinyModel("Flux2Transformer2DModel", _WITHOUT_GUIDANCE, _with_references, _TIMESTEPS, "references"))
