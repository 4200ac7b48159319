# SPDX-License-Identifier: Apache-2.0
"""Relatives of Sana: SANA-Video, SANA-WM and its refiner, an LTX-2 without its audio stream."""

import torch

from tiny_models.base import Inputs, TinyModel, add


def _video(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 4, 2, 4, 4, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        timestep=torch.tensor([timestep]),
    )


add(
    TinyModel(
        "SanaVideoTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=4,
            patch_size=(1, 2, 2),
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ),
        _video,
    )
)


def _world(timestep: float, generator: torch.Generator) -> Inputs:
    """Of two frames, each with its timestep, seen by a camera that stands still."""
    pose = torch.eye(4).flatten()
    camera = torch.cat([pose, torch.tensor([4.0, 4.0, 2.0, 2.0])])
    return dict(
        hidden_states=torch.randn(1, 4, 2, 4, 4, generator=generator),
        timestep=torch.full((1, 1, 2), timestep),
        encoder_hidden_states=torch.randn(1, 1, 5, 32, generator=generator),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 0]]),
        camera_conditions=camera.expand(1, 2, 20).clone(),
        chunk_plucker=torch.randn(1, 6, 2, 4, 4, generator=generator),
    )


add(
    TinyModel(
        "SanaWMTransformer3DModel",
        dict(
            in_channels=4,
            num_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            softmax_every_n=2,
            linear_head_dim=16,
            chunk_plucker_channels=6,
            caption_channels=32,
        ),
        _world,
    )
)


def _refiner(timestep: float, generator: torch.Generator) -> Inputs:
    angles = torch.rand(1, 16, 32, generator=generator)
    return dict(
        hidden_states=torch.randn(1, 16, 16, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        timestep=torch.tensor([[timestep]]),
        video_rotary_emb=(angles.cos(), angles.sin()),
    )


add(
    TinyModel(
        "SanaWMLTX2RefinerTransformer3DModel",
        dict(
            in_channels=16,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            audio_in_channels=16,
            audio_out_channels=16,
            audio_num_attention_heads=2,
            audio_attention_head_dim=16,
            audio_cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ),
        _refiner,
        (0.9, 0.7, 0.4),
    )
)
