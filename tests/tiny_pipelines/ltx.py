# SPDX-License-Identifier: Apache-2.0
"""LTX-Video: with a picture, each token has a timestep of its own."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from tiny_pipelines.base import TinyPipeline, add, flow, noise, other_flow, picture, seeded, without_encoders


def build(cls: Any = LTXPipeline) -> Any:
    transformer = seeded(
        LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    vae = seeded(
        AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    return without_encoders(cls, "tokenizer", "text_encoder", transformer=transformer, vae=vae, scheduler=flow())


def image_to_video() -> LTXImageToVideoPipeline:
    return build(LTXImageToVideoPipeline)


def condition() -> LTXConditionPipeline:
    return build(LTXConditionPipeline)


CALL: dict[str, Any] = dict(
    prompt_embeds=noise(1, 5, 32),
    prompt_attention_mask=torch.tensor([[1, 1, 1, 1, 0]]),
    negative_prompt_embeds=noise(1, 5, 32, seed=1),
    negative_prompt_attention_mask=torch.tensor([[1, 1, 0, 0, 0]]),
    guidance_scale=3.0,
    height=32,
    width=32,
    num_frames=9,
)
IMAGE = {**CALL, "image": picture(32)}

add(TinyPipeline("LTX", build, CALL, other_flow))
add(TinyPipeline("LTX-image", image_to_video, IMAGE, other_flow, like="LTX", per_token=True))
add(
    TinyPipeline(
        "LTX-condition", condition, IMAGE, lambda: flow(1.5, use_karras_sigmas=True), like="LTX", per_token=True
    )
)
