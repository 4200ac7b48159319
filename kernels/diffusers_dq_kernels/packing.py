# SPDX-License-Identifier: Apache-2.0
"""The layouts of saved files, and int4 weights of two levels. N out_features, K in_features in groups of g.

int4: two's complement nibbles, two a byte along K, the even k in the low nibble.

    byte[n, j] = (q[n, 2 j] & 15) | (q[n, 2 j + 1] << 4)

int6: four values in three bytes along K, as one little-endian word of 24 bits with the first k in the lowest bits.

    word[n, j] = sum over i of (q[n, 4 j + i] & 63) << (6 i),   byte[n, 3 j + b] = (word[n, j] >> (8 b)) & 255

Two levels (QServe, arXiv 2405.04532): an integer times q makes the int8 weight, and one scale a channel the rest.
"""

import torch
from torch import Tensor

from ._groups import group_size, multiply_groups

__all__ = [
    "pack_int4",
    "pack_int6",
    "pack_two_level",
    "split_multipliers",
    "unpack_int4",
    "unpack_int6",
]

_LARGEST_MULTIPLIER = 16


def pack_int4(q: Tensor) -> Tensor:
    """q: [N, K] int8 in [-8, 7], K even.   Returns [N, K / 2] uint8."""
    _check_values("pack_int4", q, 2, "K even", -8, 7)
    nibbles = q.view(torch.uint8)
    return (nibbles[:, 0::2] & 15) | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """packed: [N, K / 2] uint8.   Returns [N, K] int8 in [-8, 7]."""
    if packed.dtype != torch.uint8 or packed.dim() != 2:
        raise ValueError(f"unpack_int4: expected uint8 [N, K / 2], got {packed.dtype} {list(packed.shape)}")
    # A byte hl becomes the two bytes ?l, ?h of an int16, little-endian; shifting both as int8 carries the signs down.
    wide = packed.to(torch.int16)
    return (wide | (wide << 4)).view(torch.int8).bitwise_left_shift_(4).bitwise_right_shift_(4)


def pack_int6(q: Tensor) -> Tensor:
    """q: [N, K] int8 in [-32, 31], K a multiple of 4.   Returns [N, 3 K / 4] uint8."""
    _check_values("pack_int6", q, 4, "K a multiple of 4", -32, 31)
    a, b, c, d = (q.view(torch.uint8)[:, i::4] & 63 for i in range(4))
    return torch.stack([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], 2).flatten(1)


def unpack_int6(packed: Tensor) -> Tensor:
    """packed: [N, 3 K / 4] uint8.   Returns [N, K] int8 in [-32, 31]."""
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] % 3:
        raise ValueError(
            f"unpack_int6: expected uint8 [N, 3 K / 4], a multiple of 3, got {packed.dtype} {list(packed.shape)}"
        )
    a, b, c = (packed[:, i::3] for i in range(3))
    high = torch.stack([a << 2, (a >> 4) | (b << 4), (b >> 2) | (c << 6), c], 2)  # each in the upper six bits
    return high.flatten(1).view(torch.int8).bitwise_right_shift_(2)


def _check_values(name: str, q: Tensor, multiple: int, expected: str, low: int, high: int) -> None:
    if q.dtype != torch.int8 or q.dim() != 2 or q.shape[1] % multiple:
        raise ValueError(f"{name}: expected int8 [N, K] with {expected}, got {q.dtype} {list(q.shape)}")
    if q.numel() and not low <= int(q.min()) <= int(q.max()) <= high:
        raise ValueError(f"{name}: expected values in [{low}, {high}], got [{int(q.min())}, {int(q.max())}]")


# Two levels


def split_multipliers(weight_scales: Tensor) -> tuple[Tensor, Tensor]:
    """weight_scales: [N, K / g] float, not negative.   Returns ([N, K / g] int8 in 1 to 16, [N] fp32).

    Multiplier * channel scale stands for the scale of a group. The largest scale of a channel is kept exactly, as 16;
    any other moves by at most half a channel scale, which is 1/32 of the largest, or where it is below a half, by less
    than a whole one, upwards: a group never loses range to a step of zero.
    """
    if weight_scales.dim() != 2 or weight_scales.shape[1] == 0 or not weight_scales.is_floating_point():
        given = f"{weight_scales.dtype} {list(weight_scales.shape)}"
        raise ValueError(f"split_multipliers: expected float [N, K / g] with at least one group, got {given}")
    scales = weight_scales.float()
    channel = scales.amax(1) / _LARGEST_MULTIPLIER
    steps = scales / channel.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return steps.round().clamp(1, _LARGEST_MULTIPLIER).to(torch.int8), channel


def pack_two_level(q: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """q: [N, K] int8 in [-8, 7].   multiplier: [N, K / g] int8 in 1 to 16, so that no product leaves [-128, 127].

    Returns (weight [N, K / 2] uint8, weight_sum [N] int32), as `linear_w4a8` takes them beside the multiplier.
    """
    packed = pack_int4(q)
    if multiplier.dtype != torch.int8 or multiplier.shape[:-1] != q.shape[:1]:
        given = f"{multiplier.dtype} {list(multiplier.shape)}"
        raise ValueError(f"pack_two_level: expected multiplier int8 [{len(q)}, K / g], got {given}")
    group_size("multiplier", multiplier, q.shape[1])
    if multiplier.numel() and not 1 <= int(multiplier.min()) <= int(multiplier.max()) <= _LARGEST_MULTIPLIER:
        given = f"[{int(multiplier.min())}, {int(multiplier.max())}]"
        raise ValueError(f"pack_two_level: expected multipliers in [1, {_LARGEST_MULTIPLIER}], got {given}")
    return packed, multiply_groups(q, multiplier).sum(1, dtype=torch.int32)
