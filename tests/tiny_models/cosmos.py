# SPDX-License-Identifier: Apache-2.0
"""Two frames of 4 by 4 tokens. Without the mask of padding, which takes torchvision to resize."""

import torch

from tiny_models.base import Inputs, TinyModel, add

SETTINGS = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    text_embed_dim=32,
    adaln_lora_dim=16,
    max_size=(4, 16, 16),
    concat_padding_mask=False,
)


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(2, 4, 2, 8, 8, generator=generator),
        timestep=torch.tensor([timestep, timestep]),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        fps=16,
    )


def _inputs_with_step_per_frame(timestep: float, generator: torch.Generator) -> Inputs:
    """Image to video of version 2: the first frame is given, hardly noisy, and marked so."""
    steps = torch.tensor([1e-4, timestep]).view(1, 1, 2, 1, 1).expand(2, -1, -1, -1, -1)
    given = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1, 1).expand(2, -1, -1, 8, 8)
    return dict(_inputs(timestep, generator), timestep=steps, condition_mask=given)


def _inputs_with_picture(timestep: float, generator: torch.Generator) -> Inputs:
    """Version 2.5: text of several layers of a language model, and tokens of a picture."""
    text, picture = torch.randn(2, 5, 48, generator=generator), torch.randn(2, 3, 16, generator=generator)
    return dict(_inputs(timestep, generator), encoder_hidden_states=(text, picture))


NAME, TIMESTEPS = "CosmosTransformer3DModel", (0.98, 0.5, 0.02)
later = dict(
    extra_pos_embed_type=None,
    use_crossattn_projection=True,
    crossattn_proj_in_channels=48,
    encoder_hidden_states_channels=32,
    img_context_dim_in=16,
    img_context_num_tokens=3,
    img_context_dim_out=32,
)
add(TinyModel(NAME, SETTINGS, _inputs, (1.09, 0.0, -1.5)))
add(TinyModel(NAME, {**SETTINGS, "in_channels": 5}, _inputs_with_step_per_frame, TIMESTEPS, "step_per_frame"))
add(TinyModel(NAME, {**SETTINGS, **later}, _inputs_with_picture, TIMESTEPS, "picture"))
