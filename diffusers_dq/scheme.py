# SPDX-License-Identifier: Apache-2.0
"""What a tensor is rounded to: a value, not a mechanism."""

from dataclasses import dataclass
from typing import Literal

Granularity = Literal["tensor", "token", "channel", "group"]
GROUP_MULTIPLE = 32  # of input channels: the depth of one int8 instruction of tensor cores


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """Uniform quantization to `bits`-bit integers.

    granularity: what shares one scale. "channel" is an output channel of a weight, "token" a row of an activation,
        "group" a run of `group_size` input channels in one row of either (Q-DiT).
    symmetric: no zero point.   dynamic: the scale is found at run time from the tensor itself.
    """

    bits: int
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(
                f"bits must be between 2 and 8, got {self.bits}; 16 (not rounded) is the absence of a scheme"
            )
        if self.granularity == "token" and not self.dynamic:
            raise ValueError("granularity 'token' needs dynamic=True: a static scale cannot know the tokens to come")
        if self.granularity != "group" and not self.symmetric and (self.dynamic or self.granularity == "channel"):
            what = "a dynamic scheme" if self.dynamic else "a weight's scheme"
            raise ValueError(
                f"{what} is symmetric unless by group: the integer kernels carry zero points of groups only"
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"group_size goes with granularity 'group' and with no other, got {self.group_size} with"
                f" {self.granularity!r}"
            )
        if self.group_size is not None:
            check_group_size(self.group_size)

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1


def check_group_size(size: int) -> None:
    if size < 1 or size % GROUP_MULTIPLE:
        raise ValueError(f"group_size must be a multiple of {GROUP_MULTIPLE}, got {size}")


def fitting_group(in_features: int, wanted: int) -> int | None:
    """The largest group size up to `wanted` that the kernels take for this width; None where there is none."""
    sizes = range(wanted - wanted % GROUP_MULTIPLE, 0, -GROUP_MULTIPLE)
    return next((size for size in sizes if in_features % size == 0), None)
