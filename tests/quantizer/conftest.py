# SPDX-License-Identifier: Apache-2.0
"""Pipelines quantized in every way, and what they were before they were saved. Each is made when it is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from saved_models import VARIANTS, generate, transformer_copied

import diffusers_dq as dq

Build = Callable[..., DiTPipeline]


@pytest.fixture(scope="session")
def quantized(dit_folder: Path, dit_statistics: dq.Statistics) -> Build:
    """A function: a new pipeline, quantized as VARIANTS says."""

    def build(variant: str, dtype: torch.dtype = torch.float32) -> DiTPipeline:
        pipe = DiTPipeline.from_pretrained(dit_folder, torch_dtype=dtype)
        dq.quantize(pipe, dq.DQConfig(**VARIANTS[variant]), statistics=dit_statistics, progress=False)
        return pipe

    return build


class Saved(dict[str, tuple[str, torch.Tensor, torch.Tensor]]):
    """variant -> (folder, outputs of its transformer, images of its pipeline), all from before saving."""

    def __init__(self, quantized: Build, run_dit: Any, folders: pytest.TempPathFactory) -> None:
        super().__init__()
        self.quantized, self.run_dit, self.folders = quantized, run_dit, folders

    def __missing__(self, variant: str) -> tuple[str, torch.Tensor, torch.Tensor]:
        pipe = self.quantized(variant)
        folder = str(self.folders.mktemp(variant))
        self[variant] = (folder, self.run_dit(pipe.transformer), generate(pipe))
        pipe.save_pretrained(folder)
        return self[variant]


@pytest.fixture(scope="session")
def saved(quantized: Build, run_dit: Any, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(quantized, run_dit, tmp_path_factory)


@pytest.fixture
def damaged(saved: Saved, tmp_path: Path) -> Path:
    """A copy of the saved htg-w4a8 pipeline's transformer, to be damaged."""
    return transformer_copied(saved["htg-w4a8"][0], tmp_path)
