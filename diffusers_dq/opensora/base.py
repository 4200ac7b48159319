# SPDX-License-Identifier: Apache-2.0
"""What both Open-Sora pipelines do: captions by T5, guidance against the learned empty caption, frames by a VAE.

Notation: B videos, T frames, L caption tokens.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn

from diffusers_dq.opensora.captions import clean_caption

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
OUTPUT_TYPES = ("np", "pt", "pil", "latent")


@dataclass
class OpenSoraPipelineOutput(BaseOutput):
    """frames: [B, T, height, width, 3] in [0, 1] ("np"), [B, T, 3, height, width] ("pt"), a list of pictures a video
    ("pil"), or latents [B, channels, T, height, width] ("latent")."""

    frames: Any


class VideoPipeline(DiffusionPipeline):
    """The parts that the two pipelines share. Every component but the transformer and the scheduler may be None: give
    `prompt_embeds` instead of a text encoder, `output_type="latent"` instead of a VAE."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder", "vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        tokenizer: object,
        text_encoder: nn.Module,  # or None; diffusers reads these types, and understands single classes only
        vae: ModelMixin,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        if vae is not None and not isinstance(vae, AutoencoderKL | AutoencoderTiny):
            raise ValueError(
                f"vae must be an AutoencoderKL or AutoencoderTiny, which decode frame by frame; got"
                f" {type(vae).__name__}. Without one (vae=None), output_type='latent' returns latents"
            )
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    # Prompts

    def encode_prompt(
        self, prompt: str | Sequence[str], device: torch.device | None = None, clean: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, channels] and mask [B, L], int64; L is that of the transformer's empty caption.

        clean: by `clean_caption`. Longer prompts are cut. Raises ValueError without a tokenizer and a text encoder.
        """
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError("the pipeline has no tokenizer and text encoder; give prompt_embeds instead of prompt")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        tokens = self.tokenizer(
            [clean_caption(text) for text in prompts] if clean else prompts,
            max_length=self.transformer.config.caption_length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        device = device or self._execution_device
        mask = tokens.attention_mask.to(device)
        return self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0], mask

    def _conditions(
        self,
        prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        prompt_attention_mask: Tensor | None,
        videos_per_prompt: int,
        clean: bool,
        guided: bool,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings and mask, [n, L, channels] and [n, L]: n = B, or 2 B with the empty captions behind the prompts.

        An empty caption has the mask of the prompt it stands against, as in training: its first tokens count.
        """
        device = self._execution_device
        if prompt is not None and prompt_embeds is None:
            embeds, mask = self.encode_prompt(prompt, device, clean)
        elif prompt is None and prompt_embeds is not None:
            embeds = prompt_embeds.to(device)
            mask = torch.ones(embeds.shape[:2]) if prompt_attention_mask is None else prompt_attention_mask
            mask = mask.to(device)
        else:
            raise ValueError("give either prompt or prompt_embeds")
        null = self.transformer.caption_projection.y_embedding
        if embeds.ndim != 3 or embeds.shape[1] > null.shape[0] or embeds.shape[2] != null.shape[1]:
            raise ValueError(
                f"prompt_embeds must have shape [videos, up to {null.shape[0]}, {null.shape[1]}], got"
                f" {list(embeds.shape)}"
            )
        if mask.shape != embeds.shape[:2] or not mask.bool().any(dim=1).all():
            raise ValueError(
                f"prompt_attention_mask must have shape {list(embeds.shape[:2])} and a token that counts in each row;"
                f" got {list(mask.shape)} with {mask.bool().sum(dim=-1).tolist()} tokens"
            )
        embeds, mask = (x.repeat_interleave(videos_per_prompt, dim=0) for x in (embeds, mask))
        if guided:
            empty = null[: embeds.shape[1]].to(embeds).expand_as(embeds)
            embeds, mask = torch.cat([embeds, empty]), torch.cat([mask, mask])
        return embeds, mask

    # Latents

    def _check(self, height: int, width: int, output_type: str, callback_inputs: Sequence[str]) -> None:
        """Raises ValueError before anything is computed."""
        if height % self.vae_scale_factor or width % self.vae_scale_factor or min(height, width) < 1:
            raise ValueError(
                f"height and width must be multiples of {self.vae_scale_factor}, got {height} and {width}"
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")
        if self.vae is None and output_type != "latent":
            raise ValueError(f"the pipeline has no VAE to make {output_type!r} of latents; use output_type='latent'")
        unknown = sorted(set(callback_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs may hold 'latents' only, got {', '.join(unknown)}")

    def _initial_latents(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        """fp32: samplers add up many small steps."""
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents must have shape {list(shape)}, got {list(latents.shape)}")
        return latents.to(device, torch.float32)

    def _denoise(
        self,
        latents: Tensor,
        conditions: Mapping[str, Any],
        output_of: Callable[[Tensor], Tensor],
        guided: bool,
        generator: torch.Generator | list[torch.Generator] | None,
        callback: StepCallback | None,
        callback_inputs: Sequence[str],
    ) -> Tensor:
        """conditions: further arguments of the transformer.   output_of: what the scheduler gets of its output, which
        is of 2 B samples, prompts first, where `guided`."""
        scheduler, timesteps = self.scheduler, self.scheduler.timesteps
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        scaled = getattr(scheduler, "scale_model_input", lambda latents, t: latents)
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as progress:
            for i, t in enumerate(timesteps):
                x = scaled(latents, t)
                x = torch.cat([x, x]) if guided else x
                sample = self.transformer(x, timestep=t.expand(len(x)), **conditions, return_dict=False)[0]
                latents = scheduler.step(output_of(sample), t, latents, **extra, return_dict=False)[0]
                if callback is not None:
                    tensors = callback(self, i, t, {"latents": latents} if callback_inputs else {})
                    latents = tensors.pop("latents", latents)
                progress.update()
        return latents

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    def decode_latents(self, latents: Tensor, frames_at_once: int = 8) -> Tensor:
        """Each frame by itself.   latents: [B, channels, T, h, w].   Returns [B, 3, T, height, width] in [-1, 1]."""
        vae = self.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        frames = (latents / vae.config.scaling_factor + shift).transpose(1, 2).flatten(0, 1).to(vae.dtype)
        pictures = torch.cat([vae.decode(part, return_dict=False)[0] for part in frames.split(frames_at_once)])
        return pictures.unflatten(0, (len(latents), -1)).transpose(1, 2)

    def _finish(self, latents: Tensor, output_type: str, return_dict: bool) -> Any:
        frames = latents
        if output_type != "latent":
            frames = self.video_processor.postprocess_video(self.decode_latents(latents).float(), output_type)
        self.maybe_free_model_hooks()
        return OpenSoraPipelineOutput(frames=frames) if return_dict else (frames,)
