# SPDX-License-Identifier: Apache-2.0
"""Triton kernels run in the interpreter where there is no GPU: the variable must be set before Triton is imported.

Below: tiny models with random weights, shared by the tests of the package. diffusers is imported where it is needed,
so that the kernel tests do not wait for it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # the models are tiny, and pytest-xdist runs a process a core


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved DiTPipeline: 2 blocks of width 32, the embedders equal in both blocks, as in published checkpoints."""
    from support import tiny_pipeline

    pipe = tiny_pipeline()
    first, second = (block.norm1.emb for block in pipe.transformer.transformer_blocks)
    second.load_state_dict(first.state_dict())
    folder = tmp_path_factory.mktemp("dit")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dit_statistics(dit_folder: Path) -> Any:
    """Of the model in `dit_folder` in fp32, 10 steps; `dit_statistics_path` is its file."""
    from diffusers import DiTPipeline
    from support import CALLS

    import diffusers_dq as dq

    pipe = DiTPipeline.from_pretrained(dit_folder)
    return dq.calibrate(pipe, CALLS, num_inference_steps=10, second_moments=True, progress=False)


@pytest.fixture(scope="session")
def dit_statistics_path(dit_statistics: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("statistics") / "dit.safetensors")
    dit_statistics.save(path)
    return path


@pytest.fixture(scope="session")
def run_dit() -> Callable[..., torch.Tensor]:
    """A function: what a DiT makes of the same noise at the given timesteps, [T, 2, 4, 8, 8]."""

    @torch.no_grad()
    def run(model: torch.nn.Module, timesteps: tuple[int, ...] = (950, 500, 20)) -> torch.Tensor:
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        x = noise.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))
        labels = torch.tensor([1, 2])
        return torch.stack([model(x, timestep=torch.tensor([t, t]), class_labels=labels).sample for t in timesteps])

    return run


@pytest.fixture(scope="session")
def tiny_flux() -> Callable[[], Any]:
    """A function: a FluxPipeline of two narrow blocks that takes embeddings and returns latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    def build() -> FluxPipeline:
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ).eval()
        encoders = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
        return FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=transformer, **encoders)

    return build


@pytest.fixture(scope="session")
def run_flux() -> Callable[[torch.nn.Module], torch.Tensor]:
    """A function: what a Flux makes of the same noise at three timesteps, [T, 1, 16, 16]."""

    @torch.no_grad()
    def run(model: Any) -> torch.Tensor:
        seed = torch.Generator().manual_seed(0)
        noise, prompt, pooled = (torch.randn(1, *shape, generator=seed) for shape in ((16, 16), (4, 32), (32,)))
        inputs = {
            "hidden_states": noise.to(model.dtype),
            "encoder_hidden_states": prompt.to(model.dtype),
            "pooled_projections": pooled.to(model.dtype),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(4, 3),
        }
        return torch.stack([model(timestep=torch.tensor([t]), **inputs).sample for t in (0.95, 0.5, 0.02)])

    return run


@pytest.fixture(scope="session")
def tiny_unknown() -> Callable[[], Any]:
    """A function: a pipeline of two narrow blocks that takes embeddings and returns latents. It stands for the
    architectures of which the package has no spec: once it has one of Ovis-Image, put another in its place."""
    from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel

    from diffusers_dq.specs import SPECS

    assert SPECS.get(OvisImageTransformer2DModel.__name__) is None

    def build() -> OvisImagePipeline:
        torch.manual_seed(0)
        transformer = OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
        ).eval()
        encoders = dict.fromkeys(["vae", "text_encoder", "tokenizer"])
        return OvisImagePipeline(FlowMatchEulerDiscreteScheduler(), transformer=transformer, **encoders)

    return build


@pytest.fixture(scope="session")
def unknown_call() -> dict[str, Any]:
    """Arguments of `tiny_unknown`'s pipeline: a picture of 16 tokens, 4 of text."""
    embeds = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
    return dict(prompt_embeds=embeds, guidance_scale=1.0, height=64, width=64)


@pytest.fixture(scope="session")
def run_unknown() -> Callable[[torch.nn.Module], torch.Tensor]:
    """A function: what the model of `tiny_unknown` makes of the same noise at three timesteps, [T, 1, 16, 16]."""

    @torch.no_grad()
    def run(model: Any) -> torch.Tensor:
        seed = torch.Generator().manual_seed(0)
        noise, prompt = (torch.randn(1, *shape, generator=seed) for shape in ((16, 16), (4, 32)))
        inputs = {
            "hidden_states": noise.to(model.dtype),
            "encoder_hidden_states": prompt.to(model.dtype),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(4, 3),
        }
        return torch.stack([model(timestep=torch.tensor([t]), **inputs).sample for t in (0.95, 0.5, 0.02)])

    return run
