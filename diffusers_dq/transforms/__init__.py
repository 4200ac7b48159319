# SPDX-License-Identifier: Apache-2.0
"""Exact changes of basis of a linear's input, and where their two halves go."""

from diffusers_dq.transforms.base import Chain, ChannelTransform, Transform
from diffusers_dq.transforms.channel import Scale, Shift
from diffusers_dq.transforms.rotation import NOT_ROTATED, Rotate

__all__ = ["NOT_ROTATED", "Chain", "ChannelTransform", "Rotate", "Scale", "Shift", "Transform"]
