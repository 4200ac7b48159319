# SPDX-License-Identifier: Apache-2.0
"""What is noted beside the figures of an evaluation."""

import datetime
from typing import Any

import torch

from diffusers_dq.hardware import name_of, source, versions

_PACKAGES = (
    "diffusers-dq",
    "torch",
    "diffusers",
    "accelerate",
    "transformers",
    "torchmetrics",
    "torch-fidelity",
    "numpy",
)


def provenance(device: str) -> dict[str, Any]:
    """JSON-able. commit, dirty: of the checkout that runs; None where the package is installed without git."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(_PACKAGES),
        "hardware": name_of(device),
        "threads": torch.get_num_threads(),
        **source(),
    }
