# SPDX-License-Identifier: Apache-2.0
from typing import Any

from diffusers import FluxImg2ImgPipeline, FluxPipeline, FluxTransformer2DModel

from tiny_pipelines.base import (
    TinyPipeline,
    add,
    flow,
    image_vae,
    noise,
    other_flow,
    picture,
    seeded,
    without_encoders,
)


def build(cls: Any = FluxPipeline) -> FluxPipeline:
    transformer = seeded(
        FluxTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    vae = image_vae(4, shift_factor=0.1)
    return without_encoders(cls, *absent, transformer=transformer, vae=vae, scheduler=flow(use_dynamic_shifting=True))


def image_to_image() -> FluxImg2ImgPipeline:
    return build(FluxImg2ImgPipeline)


CALL: dict[str, Any] = dict(prompt_embeds=noise(1, 5, 32), pooled_prompt_embeds=noise(1, 32), height=16, width=16)

add(TinyPipeline("FLUX", build, CALL, other_flow))
add(TinyPipeline("FLUX-image", image_to_image, {**CALL, "image": picture(16)}, other_flow, like="FLUX"))
