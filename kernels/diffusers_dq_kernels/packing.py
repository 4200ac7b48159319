# SPDX-License-Identifier: Apache-2.0
"""The int4 layout of saved files: two's complement nibbles, two a byte along K, the even k in the low nibble.

`byte[n, j] = (q[n, 2 j] & 15) | (q[n, 2 j + 1] << 4)`
"""

import torch
from torch import Tensor

__all__ = ["pack_int4", "unpack_int4"]


def pack_int4(q: Tensor) -> Tensor:
    """q: [N, K] int8 in [-8, 7], K even.   Returns [N, K / 2] uint8."""
    if q.dtype != torch.int8 or q.dim() != 2 or q.shape[1] % 2:
        raise ValueError(f"pack_int4: expected int8 [N, K] with K even, got {q.dtype} {list(q.shape)}")
    if q.numel() and not -8 <= int(q.min()) <= int(q.max()) <= 7:
        raise ValueError(f"pack_int4: expected values in [-8, 7], got [{int(q.min())}, {int(q.max())}]")
    nibbles = q.view(torch.uint8)
    return (nibbles[:, 0::2] & 15) | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """packed: [N, K / 2] uint8.   Returns [N, K] int8 in [-8, 7]."""
    if packed.dtype != torch.uint8 or packed.dim() != 2:
        raise ValueError(f"unpack_int4: expected uint8 [N, K / 2], got {packed.dtype} {list(packed.shape)}")
    # A byte hl becomes the two bytes ?l, ?h of an int16, little-endian; shifting both as int8 carries the signs down.
    wide = packed.to(torch.int16)
    return (wide | (wide << 4)).view(torch.int8).bitwise_left_shift_(4).bitwise_right_shift_(4)
