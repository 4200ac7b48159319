# SPDX-License-Identifier: Apache-2.0
"""Timestep-aware post-training quantization of diffusion transformers inside Hugging Face diffusers.

Importing the package registers quant_method "diffusers_dq" with diffusers.
"""

from diffusers_dq.calibration import calibrate
from diffusers_dq.config import DQConfig
from diffusers_dq.evaluation import Comparison, compare
from diffusers_dq.hub import push_to_hub
from diffusers_dq.methods import methods
from diffusers_dq.noise_correction import PTQDScheduler
from diffusers_dq.quantize import quantize
from diffusers_dq.quantizer import register
from diffusers_dq.report import LinearReport, QuantizationReport, inspect
from diffusers_dq.search import allocate_bits, search_bits, search_group_sizes
from diffusers_dq.statistics import Statistics
from diffusers_dq.text_cache import TextCache, cache_text

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "DQConfig",
    "LinearReport",
    "PTQDScheduler",
    "QuantizationReport",
    "Statistics",
    "TextCache",
    "allocate_bits",
    "cache_text",
    "calibrate",
    "compare",
    "inspect",
    "methods",
    "push_to_hub",
    "quantize",
    "search_bits",
    "search_group_sizes",
]

register()
