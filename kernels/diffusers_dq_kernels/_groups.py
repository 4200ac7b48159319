# SPDX-License-Identifier: Apache-2.0
"""Scales, zero points and multipliers with a column for every group of g input channels: [N, K / g] or [M, K / g]."""

import torch
from torch import Tensor

__all__ = ["dequantize_groups", "group_size", "largest_block_k", "multiply_groups", "unit_scale"]


def group_size(name: str, of_groups: Tensor, k: int) -> int:
    """of_groups: [..., K / g].   Returns g; ValueError unless it is a multiple of 32 that divides K."""
    groups = of_groups.shape[-1] if of_groups.dim() else 0
    if groups == 0 or k % groups or k // groups % 32:
        sizes = ", ".join(str(size) for size in range(32, k + 1, 32) if k % size == 0)
        known = f"groups of {sizes}" if sizes else "no groups (their size is a multiple of 32 that divides K)"
        raise ValueError(f"{name}: K = {k} allows {known}, got {list(of_groups.shape)}: {groups} groups; round anew")
    return k // groups


def largest_block_k(group: int) -> int:
    """The largest power of two that divides a group size: a block of a kernel lies in one group."""
    return group & -group


def multiply_groups(q: Tensor, multiplier: Tensor) -> Tensor:
    """q: [N, K].   multiplier: [N, K / g].   Returns [N, K] of q's dtype: every value times that of its group."""
    return (q.unflatten(1, (multiplier.shape[1], -1)) * multiplier[:, :, None].to(q.dtype)).flatten(1)


def dequantize_groups(q: Tensor, zero_point: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q: [N, K] integer.   zero_point: [N, K / g] integer or None.   scale: [N, K / g], or [N, 1] for all groups.

    Returns [N, K] of dtype: (q - zero_point) scale.
    """
    columns = scale.shape[1] if zero_point is None else zero_point.shape[1]
    values = q.unflatten(1, (columns, -1)).to(dtype)
    if zero_point is not None:
        values -= zero_point[:, :, None]
    values *= scale[:, :, None]
    return values.flatten(1)


def unit_scale(weight_scale: Tensor) -> Tensor:
    """weight_scale: [N, K / g].   Returns [N] ones: what an Epilogue takes where the product is scaled already."""
    return weight_scale.new_ones(weight_scale.shape[:1])
