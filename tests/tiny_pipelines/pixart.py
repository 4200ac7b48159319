# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from tiny_pipelines.base import TinyPipeline, add, ddim, image_vae, noise, seeded, without_encoders


def transformer(heads: int, **settings: Any) -> PixArtTransformer2DModel:
    return seeded(
        PixArtTransformer2DModel,
        num_attention_heads=heads,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16 * heads,
        caption_channels=32,
        **settings,
    )


def alpha() -> PixArtAlphaPipeline:
    """Sample size 128, that of 1024 pixels, makes the model ask for resolution and aspect ratio too."""
    parts = dict(vae=image_vae(), transformer=transformer(3, sample_size=128), scheduler=DPMSolverMultistepScheduler())
    return without_encoders(PixArtAlphaPipeline, "tokenizer", "text_encoder", **parts)


def sigma() -> PixArtSigmaPipeline:
    model = transformer(2, sample_size=8, use_additional_conditions=False)
    parts = dict(vae=image_vae(), transformer=model, scheduler=DPMSolverMultistepScheduler())
    return without_encoders(PixArtSigmaPipeline, "tokenizer", "text_encoder", **parts)


CALL: dict[str, Any] = dict(
    prompt_embeds=noise(1, 5, 32),
    prompt_attention_mask=torch.tensor([[1, 1, 1, 1, 0]]),
    negative_prompt=None,
    negative_prompt_embeds=noise(1, 5, 32, seed=1),
    negative_prompt_attention_mask=torch.tensor([[1, 1, 0, 0, 0]]),
    height=16,
    width=16,
    use_resolution_binning=False,
)

add(TinyPipeline("PixArt-alpha", alpha, CALL, ddim))
add(TinyPipeline("PixArt-Sigma", sigma, CALL, ddim))
