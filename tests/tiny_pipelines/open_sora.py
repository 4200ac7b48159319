# SPDX-License-Identifier: Apache-2.0
from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler

from diffusers_dq.opensora import (
    OpenSora12Pipeline,
    OpenSoraPipeline,
    STDiT3Transformer3DModel,
    STDiTTransformer3DModel,
    iddpm_scheduler,
    rectified_flow_scheduler,
)
from tiny_pipelines.base import TinyPipeline, add, image_vae, noise, other_flow, seeded, without_encoders

SETTINGS: dict[str, Any] = dict(
    num_attention_heads=2, attention_head_dim=16, num_layers=2, caption_channels=32, caption_length=5
)
CALL: dict[str, Any] = dict(prompt_embeds=noise(1, 5, 32), guidance_scale=3.0, num_frames=3, height=16, width=16)


CLIPPED: dict[str, Any] = dict(clip_sample=True, clip_sample_range=3.0)  # random weights would send latents to 1e3


def build() -> OpenSoraPipeline:
    scheduler = DDPMScheduler.from_config(iddpm_scheduler().config, **CLIPPED)
    parts = dict(transformer=seeded(STDiTTransformer3DModel, **SETTINGS), vae=image_vae(), scheduler=scheduler)
    return without_encoders(OpenSoraPipeline, "tokenizer", "text_encoder", **parts)


def build_12() -> OpenSora12Pipeline:
    transformer = seeded(STDiT3Transformer3DModel, **SETTINGS)
    parts = dict(transformer=transformer, vae=image_vae(), scheduler=rectified_flow_scheduler())
    return without_encoders(OpenSora12Pipeline, "tokenizer", "text_encoder", **parts)


add(TinyPipeline("OpenSora", build, CALL, lambda: DDIMScheduler(**CLIPPED)))
add(TinyPipeline("OpenSora12", build_12, CALL, other_flow))
