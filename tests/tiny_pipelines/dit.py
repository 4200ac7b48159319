# SPDX-License-Identifier: Apache-2.0
from diffusers import DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler

from tiny_pipelines.base import TinyPipeline, add, ddim, image_vae, seeded, without_encoders


def build() -> DiTPipeline:
    transformer = seeded(
        DiTTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
    )
    return without_encoders(DiTPipeline, transformer=transformer, vae=image_vae(), scheduler=ddim())


add(
    TinyPipeline(
        "DiT",
        build,
        dict(class_labels=[1, 2], guidance_scale=1.5),
        DPMSolverMultistepScheduler,
    )
)
