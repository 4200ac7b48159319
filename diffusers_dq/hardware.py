# SPDX-License-Identifier: Apache-2.0
"""The machine, software and source that a figure belongs to."""

import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

CHECKOUT = Path(__file__).parents[1]  # where the package is installed, no checkout: the folder that holds it
_CPU = Path("/proc/cpuinfo")


def name_of(device: str | torch.device) -> str:
    """Of the GPU, as its driver calls it, for a CUDA device; of the processor for any other."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_field("model name") or platform.processor() or platform.machine()


def cpu_field(name: str) -> str | None:
    """Of the first processor in /proc/cpuinfo; None where there is no such file or field."""
    try:
        lines = _CPU.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), None)


def version_of(package: str) -> str | None:
    """None for a package that is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Python's, then of each package as `version_of` has it."""
    return {"python": platform.python_version()} | {name: version_of(name) for name in packages}


def source(*besides: str) -> dict[str, Any]:
    """commit: of the checkout that runs.   dirty: whether files differ from it.   Both None where the package is
    installed without git, even into a folder of somebody else's checkout.

    besides: paths from the checkout's root whose changes do not count.
    """
    if not (CHECKOUT / ".git").exists():
        return {"commit": None, "dirty": None}
    status = output_of(["git", "status", "--porcelain", "--", ".", *(f":!{path}" for path in besides)])
    return {"commit": output_of(["git", "rev-parse", "HEAD"]), "dirty": None if status is None else bool(status)}


def output_of(command: Sequence[str]) -> str | None:
    """What it prints, run in CHECKOUT; None where it is missing, fails or takes longer than 30 seconds."""
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
