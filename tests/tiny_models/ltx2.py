# SPDX-License-Identifier: Apache-2.0
"""LTX-2; LTX-2.3 with gated attention, modulated text, timesteps by token and guidance that skips self-attention; and
LTX-2.5, whose text is modulated alike at all steps."""

from typing import Any

import torch

from tiny_models.base import Inputs, TinyModel, add

_SETTINGS: dict[str, Any] = dict(
    in_channels=16,
    out_channels=16,
    num_attention_heads=2,
    attention_head_dim=24,
    cross_attention_dim=48,
    audio_in_channels=16,
    audio_out_channels=16,
    audio_num_attention_heads=2,
    audio_attention_head_dim=16,
    audio_cross_attention_dim=32,
    num_layers=2,
    caption_channels=16,
)
_NEWER: dict[str, Any] = dict(
    gated_attn=True,
    audio_gated_attn=True,
    cross_attn_mod=True,
    audio_cross_attn_mod=True,
    use_prompt_embeddings=False,
    rope_type="split",
    perturbed_attn=True,
)


def _inputs(timestep: float, generator: torch.Generator, text: tuple[int, int] = (16, 16)) -> Inputs:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return dict(
        hidden_states=torch.randn(2, 12, 16, generator=generator),
        audio_hidden_states=torch.randn(2, 6, 16, generator=generator),
        encoder_hidden_states=torch.randn(2, 5, text[0], generator=generator),
        audio_encoder_hidden_states=torch.randn(2, 5, text[1], generator=generator),
        timestep=torch.tensor([timestep, timestep]),
        sigma=torch.tensor([timestep, timestep]),
        encoder_attention_mask=mask,
        audio_encoder_attention_mask=mask,
        num_frames=3,
        height=2,
        width=2,
        audio_num_frames=6,
    )


def _newer(timestep: float, generator: torch.Generator) -> Inputs:
    given = (torch.arange(12) < 4).expand(2, -1)
    return {
        **_inputs(timestep, generator, text=(48, 32)),
        "timestep": timestep * (1.0 - given.float()),
        "audio_timestep": torch.tensor([timestep, timestep]),
        "use_cross_timestep": True,
        "spatio_temporal_guidance_blocks": [1],
        "perturbation_mask": torch.tensor([0.0, 1.0]),
    }


add(TinyModel("LTX2VideoTransformer3DModel", _SETTINGS, _inputs))
add(TinyModel("LTX2VideoTransformer3DModel", {**_SETTINGS, **_NEWER}, _newer, variant="2.3"))
add(
    TinyModel(
        "LTX2VideoTransformer3DModel",
        {**_SETTINGS, **_NEWER, "use_prompt_adaln_single": False, "ff_bias": False},
        _newer,
        variant="2.5",
    )
)
