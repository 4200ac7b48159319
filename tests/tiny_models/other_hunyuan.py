# SPDX-License-Identifier: Apache-2.0
"""Relatives of HunyuanVideo: HunyuanVideo 1.5, FramePack, HunyuanImage 2.1, Motif-Video."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_HEADS = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2)


def _video15(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 4, 1, 4, 4, generator=generator),
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=torch.randn(1, 6, 32, generator=generator),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]),
        encoder_hidden_states_2=torch.randn(1, 4, 16, generator=generator),
        encoder_attention_mask_2=torch.tensor([[1, 1, 0, 0]]),
        image_embeds=torch.randn(1, 3, 16, generator=generator),
    )


add(
    TinyModel(
        "HunyuanVideo15Transformer3DModel",
        dict(
            _HEADS,
            in_channels=4,
            out_channels=4,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=32,
            text_embed_2_dim=16,
            image_embed_dim=16,
            rope_axes_dim=(4, 4, 8),
            target_size=16,
            task_type="t2v",
        ),
        _video15,
    )
)


def _framepack(timestep: float, generator: torch.Generator) -> Inputs:
    def latents(frames: int) -> torch.Tensor:
        return torch.randn(1, 4, frames, 4, 4, generator=generator)

    return dict(
        hidden_states=latents(2),
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 0]]),
        pooled_projections=torch.randn(1, 16, generator=generator),
        image_embeds=torch.randn(1, 3, 16, generator=generator),
        indices_latents=torch.arange(2),
        guidance=torch.tensor([6000.0]),
        latents_clean=latents(1),
        indices_latents_clean=torch.arange(1),
        latents_history_2x=latents(1),
        indices_latents_history_2x=torch.arange(1),
        latents_history_4x=latents(4),
        indices_latents_history_4x=torch.arange(4),
    )


add(
    TinyModel(
        "HunyuanVideoFramepackTransformer3DModel",
        dict(
            _HEADS,
            in_channels=4,
            out_channels=4,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=32,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 4, 8),
            has_image_proj=True,
            image_proj_dim=16,
            has_clean_x_embedder=True,
        ),
        _framepack,
    )
)


def _image(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 4, 4, 4, generator=generator),
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=torch.randn(1, 6, 32, generator=generator),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]),
        encoder_hidden_states_2=torch.randn(1, 4, 16, generator=generator),
        encoder_attention_mask_2=torch.tensor([[1, 1, 0, 0]]),
    )


def _distilled(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(_image(timestep, generator), guidance=torch.tensor([3500.0]), timestep_r=torch.tensor([timestep / 2]))


_IMAGE = dict(
    _HEADS,
    in_channels=4,
    out_channels=4,
    num_single_layers=2,
    num_refiner_layers=1,
    text_embed_dim=32,
    text_embed_2_dim=16,
    rope_axes_dim=(8, 8),
)
add(TinyModel("HunyuanImageTransformer2DModel", _IMAGE, _image))
add(
    TinyModel(
        "HunyuanImageTransformer2DModel",
        dict(_IMAGE, guidance_embeds=True, use_meanflow=True),
        _distilled,
        variant="distilled",
    )
)


def _motif(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 9, 2, 4, 4, generator=generator),
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
    )


_MOTIF = dict(
    _HEADS,
    in_channels=9,
    out_channels=4,
    num_single_layers=2,
    num_decoder_layers=1,
    patch_size=1,
    patch_size_t=1,
    text_embed_dim=32,
    image_embed_dim=16,
    rope_axes_dim=(4, 4, 8),
)
add(TinyModel("MotifVideoTransformer3DModel", _MOTIF, _motif))
add(
    TinyModel(
        "MotifVideoTransformer3DModel",
        dict(_MOTIF, enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True),
        _motif,
        variant="crossattention",
    )
)
