# SPDX-License-Identifier: Apache-2.0
"""Two frames of 4 by 4 tokens; a step for both, or for each token (Wan 2.2 5B: the first frame is given)."""

import torch

from tiny_models.base import Inputs, TinyModel, add

SETTINGS = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=32,
    freq_dim=32,
    ffn_dim=64,
    num_layers=2,
    rope_max_seq_len=32,
)
TIMESTEPS = (1000.0, 512.5, 20.8)


def inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 4, 2, 8, 8, generator=generator),
        timestep=torch.tensor([timestep, timestep]),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
    )


def inputs_with_picture(timestep: float, generator: torch.Generator) -> Inputs:
    """The model counts tokens of the picture as those beyond 512."""
    return dict(
        inputs(timestep, generator),
        encoder_hidden_states=torch.randn(2, 512, 32, generator=generator),
        encoder_hidden_states_image=torch.randn(2, 3, 48, generator=generator),
    )


def _inputs_with_step_per_token(timestep: float, generator: torch.Generator) -> Inputs:
    steps = torch.tensor([0.0] * 16 + [timestep] * 16)
    return dict(inputs(timestep, generator), timestep=steps.expand(2, -1))


def _vace_inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        inputs(timestep, generator),
        control_hidden_states=torch.randn(2, 8, 2, 8, 8, generator=generator),
        control_hidden_states_scale=torch.tensor([1.0, 0.5]),
    )


PICTURE = dict(image_dim=48, added_kv_proj_dim=32)

add(TinyModel("WanTransformer3DModel", SETTINGS, inputs, TIMESTEPS))
add(TinyModel("WanTransformer3DModel", {**SETTINGS, **PICTURE}, inputs_with_picture, TIMESTEPS, "picture"))
add(TinyModel("WanTransformer3DModel", SETTINGS, _inputs_with_step_per_token, TIMESTEPS, "step_per_token"))
add(
    TinyModel(
        "WanVACETransformer3DModel",
        {**SETTINGS, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 8},
        _vace_inputs,
        TIMESTEPS,
    )
)
