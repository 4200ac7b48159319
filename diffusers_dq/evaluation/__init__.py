# SPDX-License-Identifier: Apache-2.0
"""How close a quantized pipeline stays to the one in full precision, and how good its pictures are. Needs
`pip install diffusers-dq[eval]` to run."""

from diffusers_dq.evaluation.comparison import Comparison
from diffusers_dq.evaluation.features import Extractor
from diffusers_dq.evaluation.figures import Figures, Judges, measure
from diffusers_dq.evaluation.metrics import psnr, ssim
from diffusers_dq.evaluation.outliers import inject_outliers
from diffusers_dq.evaluation.paired import compare
from diffusers_dq.evaluation.pictures import PictureSet
from diffusers_dq.evaluation.plots import image_grid
from diffusers_dq.evaluation.sampling import Sampling, sample

__all__ = [
    "Comparison",
    "Extractor",
    "Figures",
    "Judges",
    "PictureSet",
    "Sampling",
    "compare",
    "image_grid",
    "inject_outliers",
    "measure",
    "psnr",
    "sample",
    "ssim",
]
