# SPDX-License-Identifier: Apache-2.0
"""Exact changes of basis of a linear's input, and where their two halves go."""

from diffusers_dq.transforms.base import Chain, Transform
from diffusers_dq.transforms.channel import Scale, Shift

__all__ = ["Chain", "Scale", "Shift", "Transform"]
