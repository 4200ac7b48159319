# SPDX-License-Identifier: Apache-2.0
"""Searches whose result is a DQConfig with an override for each linear: group sizes (Q-DiT), bits (ViDiT-Q)."""

from diffusers_dq.costs import Choice
from diffusers_dq.search.bits import allocate_bits, search_bits
from diffusers_dq.search.fitness import FeatureFID, TrajectoryError
from diffusers_dq.search.limits import BitOpsOf, LayerCost, MeanBits, ShareOfBF16, StoredBytes
from diffusers_dq.search.metrics import (
    LayerMetric,
    default_metrics,
    frame_difference_error,
    guidance_error,
    output_error,
)
from diffusers_dq.search.sizes import search_group_sizes

__all__ = [
    "BitOpsOf",
    "Choice",
    "FeatureFID",
    "LayerCost",
    "LayerMetric",
    "MeanBits",
    "ShareOfBF16",
    "StoredBytes",
    "TrajectoryError",
    "allocate_bits",
    "default_metrics",
    "frame_difference_error",
    "guidance_error",
    "output_error",
    "search_bits",
    "search_group_sizes",
]
