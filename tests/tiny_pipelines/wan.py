# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1, and its image-to-video models, which read the picture as further channels. Wan 2.2's 5B, whose timestep is
a row of tokens, zero in a given first frame. Wan 2.2's 14B, with a denoiser for the noisy steps and one for the rest:
`TWO_DENOISERS`, which is not among the others."""

from typing import Any

from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from tiny_pipelines.base import TinyPipeline, add, flow, noise, picture, seeded, without_encoders


def transformer(seed: int = 0, in_channels: int = 16) -> WanTransformer3DModel:
    return seeded(
        WanTransformer3DModel,
        seed=seed,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    )


def build(cls: Any = WanPipeline, **settings: Any) -> Any:
    """settings: further components, and where the timesteps go."""
    vae = seeded(AutoencoderKLWan, base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = dict(transformer=transformer(), transformer_2=None, vae=vae, scheduler=scheduler) | settings
    return without_encoders(cls, "tokenizer", "text_encoder", **parts)


def tokens() -> WanPipeline:
    return build(expand_timesteps=True)


def image_to_video(**settings: Any) -> WanImageToVideoPipeline:
    return build(WanImageToVideoPipeline, image_processor=None, image_encoder=None, **settings)


def image_as_channels() -> WanImageToVideoPipeline:
    return image_to_video(transformer=transformer(in_channels=36))


def image_as_tokens() -> WanImageToVideoPipeline:
    return image_to_video(expand_timesteps=True)


def two_denoisers() -> WanPipeline:
    pipe = build(boundary_ratio=0.8)
    pipe.register_modules(transformer_2=transformer(seed=5))
    return pipe


CALL: dict[str, Any] = dict(
    prompt_embeds=noise(1, 6, 32),
    negative_prompt_embeds=noise(1, 6, 32, seed=1),
    guidance_scale=3.0,
    height=32,
    width=32,
    num_frames=9,
)
IMAGE = {**CALL, "image": picture(32)}

TWO_DENOISERS = TinyPipeline("Wan-14B", two_denoisers, CALL, flow)
add(TinyPipeline("Wan", build, CALL, flow))
add(TinyPipeline("Wan-image", image_as_channels, IMAGE, flow))
add(TinyPipeline("Wan-5B", tokens, CALL, flow, like="Wan", per_token=True))
add(TinyPipeline("Wan-5B-image", image_as_tokens, IMAGE, flow, like="Wan", per_token=True))
