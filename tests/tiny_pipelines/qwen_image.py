# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from tiny_pipelines.base import TinyPipeline, add, flow, noise, other_flow, picture, seeded, without_encoders


def build(cls: Any = QwenImagePipeline) -> Any:
    transformer = seeded(
        QwenImageTransformer2DModel,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
    )
    vae = seeded(
        AutoencoderKLQwenImage,
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = flow(use_dynamic_shifting=True)
    return without_encoders(cls, "tokenizer", "text_encoder", transformer=transformer, vae=vae, scheduler=scheduler)


def image_to_image() -> QwenImageImg2ImgPipeline:
    return build(QwenImageImg2ImgPipeline)


CALL: dict[str, Any] = dict(
    prompt_embeds=noise(1, 5, 32),
    prompt_embeds_mask=torch.tensor([[1, 1, 1, 1, 0]]),
    negative_prompt_embeds=noise(1, 5, 32, seed=1),
    negative_prompt_embeds_mask=torch.tensor([[1, 1, 0, 0, 0]]),
    true_cfg_scale=3.0,
    height=32,
    width=32,
)

add(TinyPipeline("QwenImage", build, CALL, other_flow))
add(TinyPipeline("QwenImage-image", image_to_image, {**CALL, "image": picture(32)}, other_flow, like="QwenImage"))
