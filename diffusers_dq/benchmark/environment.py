# SPDX-License-Identifier: Apache-2.0
"""What is noted beside a benchmark's numbers, and where they go."""

import datetime
from pathlib import Path
from typing import Any

import torch

from diffusers_dq.hardware import CHECKOUT, name_of, output_of, source, versions

_PACKAGES = ("torch", "triton", "diffusers", "torchao", "sdnq", "diffusers-dq")
_GENERATED = ("kernels/benchmarks/results", "kernels/README.md")
_RESULTS = CHECKOUT / "kernels" / "benchmarks" / "results"


def about(device: str, commit: str | None = None) -> dict[str, Any]:
    """device: cpu or cuda.   commit: what to note where there is no git checkout to ask."""
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "hardware": name_of(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": versions(_PACKAGES) | {"cuda": torch.version.cuda},
        "driver": output_of(driver) if device == "cuda" else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **(source(*_GENERATED) if commit is None else {"commit": commit, "dirty": None}),
    }


def slug(name: str) -> str:
    """A hardware's name as part of a file's: "AMD EPYC(R) 9B14" -> "amd-epyc-9b14"."""
    plain = name.lower().replace("(r)", "").replace("(tm)", "")
    return "-".join("".join(c if c.isalnum() else " " for c in plain).split()) or "unknown"


def results_folder() -> Path:
    """kernels/benchmarks/results of the checkout that runs, else the current directory."""
    return _RESULTS if _RESULTS.is_dir() else Path.cwd()
