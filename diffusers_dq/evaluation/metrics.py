# SPDX-License-Identifier: Apache-2.0
"""How far pictures and activations are apart.

Pictures: [B, H, W, C] floating point in [0, 1], numpy or torch, on any device. Decibels throughout: 10 dB is a factor
of ten in squared error. Equal arguments give inf; NaN in, NaN out.
"""

import math
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Pictures: TypeAlias = Array | Tensor

SSIM_WINDOW = 11


def psnr(reference: Pictures, other: Pictures) -> Array:
    """Peak signal-to-noise ratio 10 log10(1 / mean((x - y)^2)) of each picture pair, in dB.

    Returns [B] float64; inf for equal pictures. Raises ValueError for pictures of other shapes or ranges.
    """
    x, y = _pair(reference, other)
    error = (x - y).square().flatten(1).mean(1)  # [B]
    return (-10 * error.log10()).numpy()


def ssim(reference: Pictures, other: Pictures) -> Array:
    """Structural similarity of each picture pair (Wang et al., 2004; Gaussian window of 11 x 11), 1 for equal.

    Returns [B] float64. Raises ValueError for pictures of other shapes or ranges or smaller than the window,
    ImportError without torchmetrics.
    """
    functional = optional("torchmetrics.functional.image")
    x, y = (pictures.movedim(-1, 1) for pictures in _pair(reference, other))  # [B, C, H, W]
    height, width = x.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of {SSIM_WINDOW} x {SSIM_WINDOW} at least, got {height} x {width}")
    value = functional.structural_similarity_index_measure(
        y, x, kernel_size=SSIM_WINDOW, sigma=1.5, data_range=1.0, reduction="none"
    )
    return value.reshape(-1).numpy()


def snr_db(reference: Pictures, other: Pictures) -> float:
    """Signal-to-noise ratio 10 log10(sum x^2 / sum (y - x)^2) of two tensors of one shape, in dB.

    Raises ValueError where the shapes differ.
    """
    x, y = (torch.as_tensor(tensor).double() for tensor in (reference, other))
    if x.shape != y.shape:
        raise ValueError(f"the tensors differ in shape: {tuple(x.shape)} and {tuple(y.shape)}")
    return ratio_db(float(x.square().sum()), float((y - x).square().sum()))


def ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two sums of squares: inf without noise, -inf with nothing but noise."""
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 10 * math.log10(signal / noise)


def optional(module: str) -> Any:
    """A module of the `eval` extra. Raises ImportError that names the extra."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"this needs {package}, which is not here: pip install diffusers-dq[eval]") from error


def _pair(reference: Pictures, other: Pictures) -> tuple[Tensor, Tensor]:
    """Both as float64 on the CPU."""
    x, y = (torch.as_tensor(pictures).detach().cpu() for pictures in (reference, other))
    if x.ndim != 4 or x.shape != y.shape:
        raise ValueError(f"expected two sets of pictures [B, H, W, C], got {tuple(x.shape)} and {tuple(y.shape)}")
    for pictures in (x, y):
        if not pictures.is_floating_point() or bool(((pictures < 0) | (pictures > 1)).any()):
            low, high = pictures.min().item(), pictures.max().item()
            raise ValueError(f"expected pictures in [0, 1], got {pictures.dtype} in [{low:g}, {high:g}]")
    return x.double(), y.double()
