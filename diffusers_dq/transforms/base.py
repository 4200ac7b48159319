# SPDX-License-Identifier: Apache-2.0
"""The protocol of a transform, and their composition.

A transform replaces the input x of a linear by u = T_g(x), an invertible function that may differ by timestep group g,
and makes up for it in weight and bias, so that `u W'^T + b'_g = x W^T + b` exactly. u itself is made upstream where a
producer can carry the transform, else online in the quantize step.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusers_dq.timesteps import Boundaries
from diffusers_dq.transforms.rotation import Rotate


class Transform(Protocol):
    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        """u = T_g(x) for x [S, ..., K] and the groups g of its first axis, [S] int64: how statistics are moved."""
        ...

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """(W', b') from weight [N, K] and bias [1 or G, N]."""
        ...


class ChannelTransform(Transform, Protocol):
    """One that keeps channels apart and their values in order: what something upstream may carry."""

    def on_rows(self, multiplier: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Compose with an affine map y -> multiplier y + offset_g of what is upstream: [K], [1 or G, K]."""
        ...


@dataclass(frozen=True)
class Chain:
    """Transforms of one LinearGroup in the order they act, and the timestep partition that their tables follow.

    rotation: acts last.
    boundaries: G - 1 thresholds in timestep values, ascending; () where nothing depends on the timestep.
    """

    transforms: tuple[ChannelTransform, ...] = ()
    boundaries: Boundaries = ()
    rotation: Rotate | None = None

    @property
    def every(self) -> tuple[Transform, ...]:
        return self.transforms if self.rotation is None else (*self.transforms, self.rotation)

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        for transform in self.every:
            x = transform.forward(x, group)
        return x

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        for transform in self.every:
            weight, bias = transform.fold(weight, bias)
        return weight, bias

    def as_affine(self, channels: int) -> tuple[Tensor, Tensor]:
        """The chain but for its rotation, as multiplier x + offset_g, fp64: [K], [1 or G, K]."""
        multiplier = torch.ones(channels, dtype=torch.float64)
        offset = torch.zeros(1, channels, dtype=torch.float64)
        for transform in self.transforms:
            multiplier, offset = transform.on_rows(multiplier, offset)
        return multiplier, offset
