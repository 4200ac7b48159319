# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo; a given picture is further channels of the input, or takes the place of the first frame's tokens,
which are then modulated as at timestep 0."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)

from tiny_pipelines.base import TinyPipeline, add, flow, noise, other_flow, picture, seeded, without_encoders


def build(
    cls: Any = HunyuanVideoPipeline, image_condition_type: str | None = None, in_channels: int = 4, **parts: Any
) -> Any:
    transformer = seeded(
        HunyuanVideoTransformer3DModel,
        in_channels=in_channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=image_condition_type,
    )
    vae = seeded(
        AutoencoderKLHunyuanVideo,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    absent = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    return without_encoders(cls, *absent, transformer=transformer, vae=vae, scheduler=flow(7.0), **parts)


def image_as_channels() -> HunyuanVideoImageToVideoPipeline:
    return build(HunyuanVideoImageToVideoPipeline, "latent_concat", in_channels=9, image_processor=None)


def image_as_tokens() -> HunyuanVideoImageToVideoPipeline:
    return build(HunyuanVideoImageToVideoPipeline, "token_replace", image_processor=None)


CALL: dict[str, Any] = dict(
    prompt_embeds=noise(1, 6, 32),
    pooled_prompt_embeds=noise(1, 32),
    prompt_attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0]]),
    height=32,
    width=32,
    num_frames=9,
)

IMAGE = {**CALL, "image": picture(32)}

add(TinyPipeline("HunyuanVideo", build, CALL, other_flow))
add(TinyPipeline("HunyuanVideo-image", image_as_channels, IMAGE, other_flow))
add(TinyPipeline("HunyuanVideo-tokens", image_as_tokens, IMAGE, other_flow, like="HunyuanVideo"))
