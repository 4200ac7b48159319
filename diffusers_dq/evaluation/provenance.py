# SPDX-License-Identifier: Apache-2.0
"""The software, source and machine that a figure belongs to."""

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "diffusers", "accelerate", "transformers", "torchmetrics", "torch-fidelity", "numpy")
_CHECKOUT = Path(__file__).parents[2]


def provenance(device: str) -> dict[str, Any]:
    """JSON-able. commit, dirty: of the checkout that runs; None where the package is installed without git."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("diffusers-dq", *_PACKAGES)},
        "hardware": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """None without git, or where the package is not in a checkout of its own."""
    if not (_CHECKOUT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_CHECKOUT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
