# SPDX-License-Identifier: Apache-2.0
"""LTX-Video, with one timestep a sample, and one a token where the first frame is given."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_SETTINGS = dict(
    in_channels=16,
    out_channels=16,
    num_attention_heads=2,
    attention_head_dim=16,
    cross_attention_dim=32,
    num_layers=2,
    caption_channels=16,
)


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 12, 16, generator=generator),
        encoder_hidden_states=torch.randn(2, 5, 16, generator=generator),
        timestep=torch.tensor([timestep, timestep]),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        num_frames=3,
        height=2,
        width=2,
        rope_interpolation_scale=(1 / 25, 32, 32),
    )


def _per_token(timestep: float, generator: torch.Generator) -> Inputs:
    given = (torch.arange(12) < 4).expand(2, -1)
    return {**_inputs(timestep, generator), "timestep": timestep * (1.0 - given.float())}


add(TinyModel("LTXVideoTransformer3DModel", _SETTINGS, _inputs))
add(TinyModel("LTXVideoTransformer3DModel", _SETTINGS, _per_token, variant="per_token"))
