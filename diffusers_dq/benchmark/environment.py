# SPDX-License-Identifier: Apache-2.0
"""The hardware, software and source that a number belongs to."""

import datetime
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "diffusers", "torchao", "sdnq", "diffusers-dq")
CHECKOUT = Path(__file__).parents[2]
_RESULTS = CHECKOUT / "kernels" / "benchmarks" / "results"


def about(device: str, commit: str | None = None) -> dict[str, Any]:
    """device: cpu or cuda.   commit: what to note where there is no git checkout to ask."""
    return {
        "hardware": hardware(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        if device == "cuda"
        else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **_source(commit),
    }


def hardware(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else _cpu_name()


def versions() -> dict[str, str | None]:
    """None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__
    return found


def slug(name: str) -> str:
    """A hardware's name as part of a file's: "AMD EPYC(R) 9B14" -> "amd-epyc-9b14"."""
    plain = name.lower().replace("(r)", "").replace("(tm)", "")
    return "-".join("".join(c if c.isalnum() else " " for c in plain).split()) or "unknown"


def results_folder() -> Path:
    """kernels/benchmarks/results of the checkout that runs, else the current directory."""
    return _RESULTS if _RESULTS.is_dir() else Path.cwd()


def _source(commit: str | None) -> dict[str, Any]:
    if commit is not None or not _RESULTS.is_dir():
        return {"commit": commit, "dirty": None}
    generated = [":!kernels/benchmarks/results", ":!kernels/README.md"]
    status = _output(["git", "status", "--porcelain", "--", ".", *generated])
    return {"commit": _output(["git", "rev-parse", "HEAD"]), "dirty": None if status is None else bool(status)}


def _output(command: Sequence[str]) -> str | None:
    """None where the command is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
