# SPDX-License-Identifier: Apache-2.0
"""A tiny pipeline as data, and the parts that several have in common."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from torch import Tensor


@dataclass(frozen=True)
class TinyPipeline:
    """build: the same pipeline each time, without text encoders, its progress bar off.
    call: arguments of `pipe(...)`, prompts as embeddings.   other: another scheduler of the family.
    like: name of the pipeline with the same transformer whose statistics serve this one too; "" where it has its own.
    per_token: whether the model is given a timestep a token.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    call: Mapping[str, Any]
    other: Callable[[], Any]
    like: str = ""
    per_token: bool = False

    def load(self, folder: str | os.PathLike[str]) -> DiffusionPipeline:
        """By the pipeline's class alone; diffusers wants to be told which of the parts it requires are absent."""
        pipe = self.build()
        absent = {name: None for name, part in pipe.components.items() if part is None}
        again = type(pipe).from_pretrained(folder, **absent)
        again.set_progress_bar_config(disable=True)
        return again


PIPELINES: dict[str, TinyPipeline] = {}


def add(pipeline: TinyPipeline) -> None:
    assert pipeline.name not in PIPELINES, pipeline.name
    PIPELINES[pipeline.name] = pipeline


def seeded(module: Callable[..., Any], seed: int = 0, **settings: Any) -> Any:
    """An instance in evaluation mode; parameters that begin as zeros or ones are random too, so that none is idle."""
    torch.manual_seed(seed)
    made = module(**settings).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.min() == parameter.max():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def without_encoders(cls: Callable[..., DiffusionPipeline], *absent: str, **parts: Any) -> DiffusionPipeline:
    """A pipeline with these components, the absent ones None."""
    pipe = cls(**parts, **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(size: int) -> Tensor:
    """[1, 3, size, size] in [0, 1]."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(7))


def image_vae(channels: int = 4, **settings: Any) -> AutoencoderKL:
    """Halves height and width."""
    return seeded(
        AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=channels,
        **settings,
    )


def ddim() -> DDIMScheduler:
    """Without clipping, as published models set it: what random weights predict would nearly all be clipped."""
    return DDIMScheduler(clip_sample=False)


def flow(shift: float = 3.0, **settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shift, **settings)


def other_flow() -> FlowMatchLCMScheduler:
    """Another solver and another shift of the same time."""
    return FlowMatchLCMScheduler(shift=1.5)
