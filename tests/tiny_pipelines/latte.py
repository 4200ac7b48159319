# SPDX-License-Identifier: Apache-2.0
from typing import Any

from diffusers import DPMSolverMultistepScheduler, LattePipeline, LatteTransformer3DModel

from tiny_pipelines.base import TinyPipeline, add, ddim, image_vae, noise, seeded, without_encoders


def build() -> LattePipeline:
    transformer = seeded(
        LatteTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=32,
        video_length=4,
    )
    parts = dict(transformer=transformer, vae=image_vae(), scheduler=ddim())
    return without_encoders(LattePipeline, "tokenizer", "text_encoder", **parts)


CALL: dict[str, Any] = dict(
    prompt_embeds=noise(1, 5, 32),
    negative_prompt=None,
    negative_prompt_embeds=noise(1, 5, 32, seed=1),
    guidance_scale=3.0,
    height=16,
    width=16,
    video_length=4,
    mask_feature=False,
)

add(TinyPipeline("Latte", build, CALL, DPMSolverMultistepScheduler))
