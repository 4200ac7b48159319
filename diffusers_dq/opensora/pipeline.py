# SPDX-License-Identifier: Apache-2.0
"""Text to video with Open-Sora 1.0."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffusers_dq.opensora.base import StepCallback, VideoPipeline

__all__ = ["OpenSoraPipeline", "iddpm_scheduler"]


def iddpm_scheduler() -> DDPMScheduler:
    """The sampler of Open-Sora 1.0: 1000 linear betas, predicted noise, learned variance, nothing clipped."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="learned_range",
        prediction_type="epsilon",
        clip_sample=False,
        timestep_spacing="linspace",
    )


class OpenSoraPipeline(VideoPipeline):
    """STDiT, a T5 v1.1 XXL text encoder (DeepFloyd/t5-v1_1-xxl), and an image VAE frame by frame
    (stabilityai/sd-vae-ft-ema). Any scheduler of predicted noise will do; only DDPM's uses the learned variance."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.0,
        guidance_channels: int | None = 3,
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
        """num_frames, height, width: of the video; those the transformer was trained for if None.

        guidance_scale: 1 is without guidance, which is against the learned empty caption; there are no negative
        prompts. guidance_channels: latent channels that are guided. The published sampler leaves the last of the four
        as the prompt has it, and so must who compares with it; None guides all.
        prompt_embeds: [B, L, caption channels] in place of a prompt, prompt_attention_mask: [B, L], all ones if None.
        output_type: "np", "pt", "pil" or "latent", see OpenSoraPipelineOutput.

        Returns OpenSoraPipelineOutput, or a tuple of its frames.
        """
        config = self.transformer.config
        num_frames = config.sample_frames if num_frames is None else num_frames
        height, width = (x or config.sample_size * self.vae_scale_factor for x in (height, width))
        self._check(height, width, output_type, callback_on_step_end_tensor_inputs)
        channels = config.in_channels
        guided_channels = channels if guidance_channels is None else guidance_channels
        if not 0 < guided_channels <= channels:
            raise ValueError(f"guidance_channels must be 1 to {channels} or None, got {guidance_channels}")
        guided = guidance_scale != 1
        embeds, mask = self._conditions(
            prompt, prompt_embeds, prompt_attention_mask, num_videos_per_prompt, clean_caption, guided
        )
        batch = len(embeds) // 2 if guided else len(embeds)
        size = (num_frames, height // self.vae_scale_factor, width // self.vae_scale_factor)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        latents = self._initial_latents((batch, channels, *size), generator, latents)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

        def output_of(sample: Tensor) -> Tensor:
            """Guided noise, and the variance that the prompt gives where the scheduler uses it."""
            if guided:
                sample, empty = sample.chunk(2)
                noise, without = sample[:, :guided_channels], empty[:, :guided_channels]
                sample = torch.cat([without + guidance_scale * (noise - without), sample[:, guided_channels:]], dim=1)
            return sample if self._uses_variance else sample[:, :channels]

        conditions = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
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

    @property
    def _uses_variance(self) -> bool:
        learned = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        return isinstance(self.scheduler, DDPMScheduler) and learned
