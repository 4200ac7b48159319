# SPDX-License-Identifier: Apache-2.0
"""Text to video with Open-Sora 1.2."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusers_dq.opensora.base import StepCallback, VideoPipeline

__all__ = ["OpenSora12Pipeline", "rectified_flow_scheduler"]

_PICTURE_FPS = 120  # what single pictures were labelled with in training
_CLIP, _CLIP_LATENTS = 17, 5  # frames that the VAE of Open-Sora 1.2 takes at once, and what it makes of them


def rectified_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The sampler of Open-Sora 1.2; the pipeline itself shifts the timesteps by size and length."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


def timestep_ratio(height: int, width: int, latent_frames: int) -> float:
    """r of `flow_times`: large and long videos stay noisy for longer. 1 for a picture of 512 x 512 pixels."""
    return math.sqrt(height * width / 512**2) * math.sqrt(latent_frames)


def flow_times(steps: int, ratio: float) -> list[float]:
    """t' = r t / (1 + (r - 1) t) for t = 1, ..., 1 / steps: from noise, 1, towards video, 0."""
    times = (1 - i / steps for i in range(steps))
    return [ratio * t / (1 + (ratio - 1) * t) for t in times]


class OpenSora12Pipeline(VideoPipeline):
    """STDiT3, a T5 v1.1 XXL text encoder (DeepFloyd/t5-v1_1-xxl), and rectified flow.

    The VAE of Open-Sora 1.2 (hpcai-tech/OpenSora-VAE-v1.2), which compresses frames four times, is not here and not in
    diffusers: without a VAE the pipeline returns latents with output_type="latent", 5 for each 17 frames, to be
    decoded with Open-Sora's own code. A VAE that is given decodes each latent by itself into one frame, which suits a
    transformer that was trained on such latents. Neither are conditioning on frames of another video, longer videos
    in several rounds, and negative prompts.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_frames: int = 51,
        height: int = 240,
        width: int = 424,
        fps: float = 24.0,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        timestep_transform: bool = True,
        aesthetic_score: float | None = 6.5,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        clean_caption: bool = True,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """num_frames: of the video; without a VAE 1 or a multiple of 17.   height, width: in pixels.

        guidance_scale: 1 is without guidance, which is against the learned empty caption.
        timestep_transform: `timestep_ratio` by size and length, as in training; False leaves steps evenly spaced.
        aesthetic_score: written behind a prompt, as behind the captions of training; None writes nothing.
        prompt_embeds: [B, L, caption channels] in place of a prompt, prompt_attention_mask: [B, L], all ones if None.
        output_type: "np", "pt", "pil" or "latent", see OpenSoraPipelineOutput.

        Returns OpenSoraPipelineOutput, or a tuple of its frames.
        """
        self._check(height, width, output_type, callback_on_step_end_tensor_inputs)
        latent_frames = self._latent_frames(num_frames)
        guided = guidance_scale != 1
        embeds, mask = self._conditions(
            None if prompt is None else _scored(prompt, aesthetic_score),
            prompt_embeds,
            prompt_attention_mask,
            num_videos_per_prompt,
            clean_caption,
            guided,
        )
        batch = len(embeds) // 2 if guided else len(embeds)
        channels = self.transformer.config.in_channels
        size = (latent_frames, height // self.vae_scale_factor, width // self.vae_scale_factor)
        latents = self._initial_latents((batch, channels, *size), generator, latents)
        ratio = timestep_ratio(height, width, latent_frames) if timestep_transform else 1.0
        self._set_timesteps(flow_times(num_inference_steps, ratio))

        def output_of(sample: Tensor) -> Tensor:
            """Guided velocity from noise to video; diffusers' flow runs from video to noise."""
            velocity = sample[:, :channels]
            if guided:
                velocity, without = velocity.chunk(2)
                velocity = without + guidance_scale * (velocity - without)
            return -velocity

        conditions = {
            "encoder_hidden_states": embeds,
            "encoder_attention_mask": mask,
            "fps": float(_PICTURE_FPS if num_frames == 1 else fps),
            "height": height,
            "width": width,
        }
        latents = self._denoise(
            latents,
            conditions,
            output_of,
            guided,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        return self._finish(latents, output_type, return_dict)

    def _set_timesteps(self, times: list[float]) -> None:
        """A scheduler that shifts by its own config does so on top; one that is told by `mu` is told not to."""
        config = self.scheduler.config
        neutral = 1.0 if config.get("time_shift_type") == "linear" else 0.0  # the latter shifts by exp(mu)
        extra = {"mu": neutral} if config.get("use_dynamic_shifting") else {}
        self.scheduler.set_timesteps(sigmas=times, device=self._execution_device, **extra)

    def _latent_frames(self, num_frames: int) -> int:
        if num_frames < 1 or (self.vae is None and num_frames != 1 and num_frames % _CLIP):
            raise ValueError(f"num_frames must be 1 or a multiple of {_CLIP} without a VAE, got {num_frames}")
        if self.vae is not None or num_frames == 1:
            return num_frames
        return num_frames // _CLIP * _CLIP_LATENTS


def _scored(prompt: str | Sequence[str], score: float | None) -> list[str]:
    """The form of words is that of the training captions; a prompt that has a score keeps it."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if score is None:
        return prompts
    return [text if "aesthetic score:" in text else f"{text} aesthetic score: {score:.1f}." for text in prompts]
