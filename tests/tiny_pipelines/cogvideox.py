# SPDX-License-Identifier: Apache-2.0
from typing import Any

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from tiny_pipelines.base import TinyPipeline, add, noise, picture, seeded, without_encoders


def build(cls: Any = CogVideoXPipeline, in_channels: int = 4) -> Any:
    transformer = seeded(
        CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=32,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
    )
    vae = seeded(
        AutoencoderKLCogVideoX,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    parts = dict(transformer=transformer, vae=vae, scheduler=CogVideoXDDIMScheduler())
    return without_encoders(cls, "tokenizer", "text_encoder", **parts)


def image_to_video() -> CogVideoXImageToVideoPipeline:
    """The image's latents are channels of the model's input."""
    return build(CogVideoXImageToVideoPipeline, in_channels=8)


CALL: dict[str, Any] = dict(
    prompt_embeds=noise(1, 6, 32),
    negative_prompt_embeds=noise(1, 6, 32, seed=1),
    guidance_scale=3.0,
    height=32,
    width=32,
    num_frames=9,
    max_sequence_length=6,
)

add(TinyPipeline("CogVideoX", build, CALL, CogVideoXDPMScheduler))
add(TinyPipeline("CogVideoX-image", image_to_video, {**CALL, "image": picture(32)}, CogVideoXDPMScheduler))
