# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image, and its editing kind: tokens of a given picture follow and are modulated as at timestep zero."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_SETTINGS = dict(
    patch_size=2,
    in_channels=16,
    out_channels=4,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    axes_dims_rope=(4, 6, 6),
)


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 16, 16, generator=generator),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        encoder_hidden_states_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool(),
        timestep=torch.tensor([timestep, timestep]),
        img_shapes=[[(1, 4, 4)]] * 2,
    )


def _editing(timestep: float, generator: torch.Generator) -> Inputs:
    return {
        **_inputs(timestep, generator),
        "hidden_states": torch.randn(2, 20, 16, generator=generator),
        "img_shapes": [[(1, 4, 4), (1, 2, 2)]] * 2,
    }


_TIMESTEPS = (0.951, 0.499, 0.021)
add(TinyModel("QwenImageTransformer2DModel", _SETTINGS, _inputs, _TIMESTEPS))
add(TinyModel("QwenImageTransformer2DModel", {**_SETTINGS, "zero_cond_t": True}, _editing, _TIMESTEPS, "editing"))
