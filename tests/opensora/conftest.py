# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints in the published layouts of Open-Sora 1.0 and 1.2, narrow: width 32, 2 heads, 2 blocks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

C, HEADS, DEPTH, CAPTION, LENGTH, IN, OUT = 32, 2, 2, 24, 6, 4, 8
LINEARS = {
    "t_embedder.mlp.0": (C, 256),
    "t_embedder.mlp.2": (C, C),
    "t_block.1": (6 * C, C),
    "y_embedder.y_proj.fc1": (C, CAPTION),
    "y_embedder.y_proj.fc2": (C, C),
    "final_layer.linear": (4 * OUT, C),
}
BLOCK_LINEARS = {
    "attn.qkv": (3 * C, C),
    "attn.proj": (C, C),
    "cross_attn.q_linear": (C, C),
    "cross_attn.kv_linear": (2 * C, C),
    "cross_attn.proj": (C, C),
    "mlp.fc1": (4 * C, C),
    "mlp.fc2": (C, 4 * C),
}
TEMPORAL_LINEARS = {"attn_temp.qkv": (3 * C, C), "attn_temp.proj": (C, C)}
FPS_LINEARS = {"fps_embedder.mlp.0": (C, 256), "fps_embedder.mlp.2": (C, C)}

Published = dict[str, Tensor]


def _random(shapes: dict[str, tuple[int, ...]]) -> Published:
    """Normal; weights scaled so that a linear keeps the size of its input."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight"):
            x = 1 + 0.3 * x
        elif name.endswith(".weight"):
            x = x / torch.Size(shape[1:]).numel() ** 0.5
        else:
            x = 0.3 * x
        tensors[name] = x
    return tensors


def _shapes(linears: dict[str, tuple[int, int]], prefix: str = "") -> dict[str, tuple[int, ...]]:
    weights = {f"{prefix}{name}.weight": shape for name, shape in linears.items()}
    return {**weights, **{f"{prefix}{name}.bias": shape[:1] for name, shape in linears.items()}}


def _outside() -> dict[str, tuple[int, ...]]:
    return {
        "x_embedder.proj.weight": (C, IN, 1, 2, 2),
        "x_embedder.proj.bias": (C,),
        "y_embedder.y_embedding": (LENGTH, CAPTION),
        "final_layer.scale_shift_table": (2, C),
    }


@pytest.fixture
def published_v1() -> Published:
    shapes = {**_outside(), **_shapes(LINEARS)}
    for i in range(DEPTH):
        shapes |= _shapes({**BLOCK_LINEARS, **TEMPORAL_LINEARS}, f"blocks.{i}.")
        shapes[f"blocks.{i}.scale_shift_table"] = (6, C)
    return _random(shapes)


@pytest.fixture
def published_v3() -> Published:
    shapes = {**_outside(), **_shapes({**LINEARS, **FPS_LINEARS})}
    for stack in ("spatial_blocks", "temporal_blocks"):
        for i in range(DEPTH):
            shapes |= _shapes(BLOCK_LINEARS, f"{stack}.{i}.")
            shapes[f"{stack}.{i}.scale_shift_table"] = (6, C)
            shapes[f"{stack}.{i}.attn.q_norm.weight"] = shapes[f"{stack}.{i}.attn.k_norm.weight"] = (C // HEADS,)
    frequencies = 10000.0 ** -(torch.arange(0, C // HEADS, 2) / (C // HEADS))
    return {**_random(shapes), "rope.freqs": frequencies}


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """A function: fp64 normal numbers, the same at every call with the same shape."""
    return lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def pipe_v1(published_v1: Published) -> Any:
    """Videos of 3 frames of 8 x 8 pixels, with an image VAE that keeps the size; prompts are given as embeddings."""
    from support import tiny_pipeline

    from diffusers_dq.opensora import OpenSoraPipeline, from_original, iddpm_scheduler

    model = from_original(published_v1, num_attention_heads=HEADS, sample_size=8, sample_frames=3)
    return _quiet(OpenSoraPipeline(None, None, tiny_pipeline().vae, model, iddpm_scheduler()))


@pytest.fixture
def pipe_v3(published_v3: Published) -> Any:
    """Without a VAE: latents of 5 frames for 17."""
    from diffusers_dq.opensora import OpenSora12Pipeline, from_original, rectified_flow_scheduler

    return _quiet(OpenSora12Pipeline(None, None, None, from_original(published_v3), rectified_flow_scheduler()))


@pytest.fixture
def call_v3(call_v1: dict[str, Any]) -> dict[str, Any]:
    return {**call_v1, "num_frames": 17, "height": 32, "width": 48, "output_type": "latent"}


@pytest.fixture
def call_v1(draw: Callable[..., Tensor]) -> dict[str, Any]:
    """Two prompts of different lengths."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    return {"prompt_embeds": draw(2, LENGTH, CAPTION).float(), "prompt_attention_mask": mask}


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
