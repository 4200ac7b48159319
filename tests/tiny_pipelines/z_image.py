# SPDX-License-Identifier: Apache-2.0
"""Z-Image: its timestep rises from 0, the noisiest, to 1."""

from typing import Any

from diffusers import ZImageImg2ImgPipeline, ZImagePipeline, ZImageTransformer2DModel

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


def build(cls: Any = ZImagePipeline) -> Any:
    transformer = seeded(
        ZImageTransformer2DModel,
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    parts = dict(transformer=transformer, vae=image_vae(4, shift_factor=0.1), scheduler=flow())
    return without_encoders(cls, "tokenizer", "text_encoder", **parts)


def image_to_image() -> ZImageImg2ImgPipeline:
    return build(ZImageImg2ImgPipeline)


CALL: dict[str, Any] = dict(
    prompt_embeds=[noise(5, 32)],
    negative_prompt_embeds=[noise(3, 32, seed=1)],
    guidance_scale=2.0,
    height=16,
    width=16,
)

add(TinyPipeline("Z-Image", build, CALL, other_flow))
add(TinyPipeline("Z-Image-image", image_to_image, {**CALL, "image": picture(16)}, other_flow, like="Z-Image"))
