# SPDX-License-Identifier: Apache-2.0
"""What holds for every contestant of a run."""

from dataclasses import dataclass
from typing import Literal

import torch

from diffusers_dq.benchmark.timing import CpuTimer, CudaTimer, Timer

Scope = Literal["model", "blocks"]
Mode = Literal["eager", "compiled"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """rounds: times each contestant runs, fewer where a group would take longer than `max_seconds`.
    scope: torch.compile of the whole model, or of each repeated block (the same code for all, so compiled once).
    backend: of torch.compile.   cuda_graphs: every contestant is captured and replayed, or none is.
    profile: steps are profiled after they were timed.
    """

    device: str
    rounds: int = 30
    max_seconds: float = 60.0
    seed: int = 0
    scope: Scope = "model"
    backend: str = "inductor"
    cuda_graphs: bool = False
    profile: bool = False

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch sees no CUDA device; use --device cpu")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.scope not in ("model", "blocks"):
            raise ValueError(f"scope must be model or blocks, got {self.scope!r}")
        if self.cuda_graphs and self.device != "cuda":
            raise ValueError("CUDA graphs need a CUDA device; leave --cuda-graphs out on the CPU")

    def timer(self, *, cold_cache: bool = False) -> Timer:
        """cold_cache: the L2 cache of a GPU is emptied before each timed call."""
        if self.device == "cpu":
            return CpuTimer()
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
        return CudaTimer(4 * l2 if cold_cache else 0)
