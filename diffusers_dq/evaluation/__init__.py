# SPDX-License-Identifier: Apache-2.0
"""How close a quantized pipeline stays to the one in full precision. Needs `pip install diffusers-dq[eval]` to run."""

from diffusers_dq.evaluation.comparison import Comparison
from diffusers_dq.evaluation.metrics import psnr, ssim
from diffusers_dq.evaluation.outliers import inject_outliers
from diffusers_dq.evaluation.paired import compare
from diffusers_dq.evaluation.plots import image_grid

__all__ = ["Comparison", "compare", "image_grid", "inject_outliers", "psnr", "ssim"]
