# SPDX-License-Identifier: Apache-2.0
"""Relatives of Wan: AnyFlow, ChronoEdit, Helios, Wan-Animate."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_WAN = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_dim=32,
    freq_dim=16,
    ffn_dim=64,
    num_layers=2,
    cross_attn_norm=True,
)


def _text(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(1, 5, 32, generator=generator)


def _anyflow(timestep: float, generator: torch.Generator) -> Inputs:
    """A timestep a frame, and the one that the step jumps to."""
    return dict(
        hidden_states=torch.randn(1, 2, 4, 4, 4, generator=generator),
        timestep=torch.full((1, 2), timestep),
        r_timestep=torch.full((1, 2), timestep / 2),
        encoder_hidden_states=_text(generator),
    )


def _anyflow_far(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 4, 4, 8, 8, generator=generator),
        timestep=torch.full((1, 4), timestep),
        r_timestep=torch.full((1, 4), timestep / 2),
        encoder_hidden_states=_text(generator),
        chunk_partition=[2, 2],
    )


_ANYFLOW = dict(_WAN, rope_max_seq_len=32, gate_value=0.25, deltatime_type="r")
_FAR = dict(_ANYFLOW, compressed_patch_size=(1, 4, 4), full_chunk_limit=3)
add(TinyModel("AnyFlowTransformer3DModel", _ANYFLOW, _anyflow, (999.0, 500.0, 20.0)))
add(TinyModel("AnyFlowFARTransformer3DModel", _FAR, _anyflow_far, (999.0, 500.0, 20.0)))


def _video(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 4, 2, 4, 4, generator=generator),
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=_text(generator),
    )


def _with_picture(timestep: float, generator: torch.Generator) -> Inputs:
    picture = torch.randn(1, 3, 16, generator=generator)
    return dict(_video(timestep, generator), encoder_hidden_states_image=picture)


_CHRONOEDIT = dict(_WAN, image_dim=16, added_kv_proj_dim=32, rope_max_seq_len=32, rope_temporal_skip_len=8)
add(TinyModel("ChronoEditTransformer3DModel", _CHRONOEDIT, _with_picture))


def _helios(timestep: float, generator: torch.Generator) -> Inputs:
    def latents(frames: int) -> torch.Tensor:
        return torch.randn(1, 4, frames, 4, 4, generator=generator)

    return dict(
        _video(timestep, generator),
        indices_hidden_states=torch.tensor([[6, 7]]),
        indices_latents_history_short=torch.tensor([[5]]),
        indices_latents_history_mid=torch.tensor([[4]]),
        indices_latents_history_long=torch.arange(4)[None],
        latents_history_short=latents(1),
        latents_history_mid=latents(1),
        latents_history_long=latents(4),
    )


add(
    TinyModel(
        "HeliosTransformer3DModel",
        dict(
            _WAN,
            rope_dim=(8, 4, 4),
            has_multi_term_memory_patch=True,
            guidance_cross_attn=True,
            zero_history_timestep=True,
            is_amplify_history=False,
        ),
        _helios,
    )
)


def _animate(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 12, 3, 4, 4, generator=generator),
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=_text(generator),
        encoder_hidden_states_image=torch.randn(1, 3, 16, generator=generator),
        pose_hidden_states=torch.randn(1, 4, 2, 4, 4, generator=generator),
        face_pixel_values=torch.randn(1, 3, 5, 16, 16, generator=generator),
    )


add(
    TinyModel(
        "WanAnimateTransformer3DModel",
        dict(
            _WAN,
            in_channels=12,
            latent_channels=4,
            image_dim=16,
            added_kv_proj_dim=32,
            rope_max_seq_len=32,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            motion_encoder_size=16,
            motion_style_dim=16,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        _animate,
    )
)


def _animate2(timestep: float, generator: torch.Generator) -> Inputs:
    """The pass over the reference, which fills the cache. The passes that denoise need compiled flex attention."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return dict(
        hidden_states=[torch.randn(4, 2, 4, 4, generator=generator)],
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=[torch.randn(5, 32, generator=generator)],
        condition_latents=[torch.randn(8, 2, 4, 4, generator=generator)],
        encoder_hidden_states_image=torch.randn(1, 3, 1280, generator=generator),
        kv_cache=WanAnimate2KVCache(2),
        kv_cache_mode="extract",
        seq_len=8,
        offset_grid_sizes=torch.tensor([[2, 2, 2]]),
    )


add(
    TinyModel(
        "WanAnimate2Transformer3DModel",
        dict(
            text_len=8,
            in_dim=12,
            dim=32,
            ffn_dim=64,
            freq_dim=16,
            text_dim=32,
            out_dim=4,
            num_heads=2,
            num_layers=2,
        ),
        _animate2,
    )
)
