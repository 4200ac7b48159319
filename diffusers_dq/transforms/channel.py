# SPDX-License-Identifier: Apache-2.0
"""Transforms that act on each input channel alone: what a norm or a value projection can carry."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Shift:
    """u = x - z_g,  W' = W,  b'_g = b + z_g W^T   (HTG, Eq. 5).   z: [G, K]."""

    z: Tensor

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        z = self.z if len(self.z) == 1 else self.z[group]
        return x - z.reshape(len(z), *[1] * (x.ndim - 2), -1).to(x)

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight, bias + self.z.to(weight) @ weight.T

    def on_rows(self, multiplier: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        return multiplier, offset - self.z.to(offset)


@dataclass(frozen=True)
class Scale:
    """u = x / s,  W' = W diag(s),  b' = b   (HTG, Eq. 6).   s: [K], > 0."""

    s: Tensor

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        return x / self.s.to(x)

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight * self.s.to(weight), bias

    def on_rows(self, multiplier: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        s = self.s.to(multiplier)
        return multiplier / s, offset / s
