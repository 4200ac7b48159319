# SPDX-License-Identifier: Apache-2.0
"""Rotations: they mix channels, so nothing upstream carries them, and the quantize step applies them online."""

from dataclasses import dataclass

import torch
from torch import Tensor

import diffusers_dq_kernels as ops

NOT_ROTATED = "not rotated: in_features is no multiple of 4"


@dataclass(frozen=True)
class Rotate:
    """u = x R,  W' = W R,  b' = b, with R = diag(signs) blockdiag(H, ..., H) / sqrt(order) (QuaRot; ViDiT-Q).

    signs: [K] int8 of +-1.   order: of the Hadamard matrix H, a divisor of K (diffusers_dq_kernels.hadamard).
    """

    signs: Tensor
    order: int

    @classmethod
    def random(cls, channels: int, seed: int, full_width: bool = False) -> "Rotate | None":
        """The same signs for the same seed and width, on every machine; None where no order divides `channels`.

        full_width: with one matrix of all channels where there is one of that order, else in blocks.
        """
        try:
            order = ops.rotation_order(channels, full_width)
        except ValueError:
            order = ops.rotation_order(channels)
        if order == 1:
            return None
        generator = torch.Generator().manual_seed(seed)
        return cls((2 * torch.randint(2, (channels,), generator=generator) - 1).to(torch.int8), order)

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        return ops.rotate(x, self.signs.to(x.device), self.order)

    def inverse(self, u: Tensor) -> Tensor:
        """u R^T. H is symmetric: its product again, then the signs."""
        unsigned = torch.ones_like(self.signs).to(u.device)
        return ops.rotate(u, unsigned, self.order) * self.signs.to(u)

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rotate(weight, self.signs.to(weight.device), self.order), bias
