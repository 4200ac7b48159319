# SPDX-License-Identifier: Apache-2.0
"""CogView and what came of it: CogView3+, CogView4, GLM-Image, ConsisID, EasyAnimate."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_HEADS = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2)


def _picture(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 4, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        timestep=torch.tensor([timestep]).long(),
        original_size=torch.tensor([[64.0, 64.0]]),
        target_size=torch.tensor([[64.0, 64.0]]),
        crop_coords=torch.zeros(1, 2),
    )


def _glm(timestep: float, generator: torch.Generator) -> Inputs:
    inputs = {key: value for key, value in _picture(timestep, generator).items() if key != "original_size"}
    return dict(inputs, prior_token_id=torch.arange(16)[None], prior_token_drop=torch.tensor([False]))


def _consisid(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 1, 4, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        timestep=torch.tensor([timestep]).long(),
        id_cond=torch.randn(1, 16, generator=generator),
        id_vit_hidden=[torch.randn(1, 2, 16, generator=generator)],
    )


def _easyanimate(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 4, 2, 8, 8, generator=generator),
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
    )


_COGVIEW = dict(_HEADS, patch_size=2, text_embed_dim=32, time_embed_dim=16, condition_dim=16)
add(TinyModel("CogView3PlusTransformer2DModel", dict(_COGVIEW, pos_embed_max_size=8, sample_size=8), _picture))
add(TinyModel("CogView4Transformer2DModel", _COGVIEW, _picture))
add(TinyModel("GlmImageTransformer2DModel", dict(_COGVIEW, prior_vq_quantizer_codebook_size=32), _glm))
add(
    TinyModel(
        "ConsisIDTransformer3DModel",
        dict(
            _HEADS,
            num_attention_heads=3,  # two thirds of the width are that of the face's features
            time_embed_dim=16,
            text_embed_dim=32,
            sample_width=8,
            sample_height=8,
            sample_frames=8,
            max_text_seq_length=5,
            cross_attn_interval=1,
            is_train_face=True,
            cross_attn_dim_head=16,
            cross_attn_num_heads=1,
            LFE_id_dim=16,
            LFE_vit_dim=16,
            LFE_depth=5,
            LFE_dim_head=16,
            LFE_num_heads=1,
            LFE_num_id_token=1,
            LFE_num_querie=1,
            LFE_output_dim=32,
            LFE_ff_mult=1,
            LFE_num_scale=1,
        ),
        _consisid,
    )
)
add(
    TinyModel(
        "EasyAnimateTransformer3DModel",
        dict(_HEADS, mmdit_layers=1, patch_size=2, sample_height=60, sample_width=90, text_embed_dim=32)
        | dict(time_embed_dim=16),
        _easyanimate,
    )
)
