# SPDX-License-Identifier: Apache-2.0
from typing import Any

from diffusers import (
    FlowMatchHeunDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)

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


def build(cls: Any = StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    transformer = seeded(
        SD3Transformer2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    absent = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    vae = image_vae(4, shift_factor=0.06)
    return without_encoders(cls, *absent, transformer=transformer, vae=vae, scheduler=flow())


def image_to_image() -> StableDiffusion3Img2ImgPipeline:
    return build(StableDiffusion3Img2ImgPipeline)


CALL: dict[str, Any] = dict(
    prompt_embeds=noise(1, 5, 32),
    pooled_prompt_embeds=noise(1, 64),
    negative_prompt_embeds=noise(1, 5, 32, seed=1),
    negative_pooled_prompt_embeds=noise(1, 64, seed=1),
    guidance_scale=3.0,
    height=16,
    width=16,
)

add(TinyPipeline("SD3", build, CALL, FlowMatchHeunDiscreteScheduler))
add(TinyPipeline("SD3-image", image_to_image, {**CALL, "image": picture(16)}, other_flow, like="SD3"))
