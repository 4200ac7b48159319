# SPDX-License-Identifier: Apache-2.0
"""What a tensor is rounded to: a value, not a mechanism."""

from dataclasses import dataclass
from typing import Literal

Granularity = Literal["tensor", "token", "channel"]


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """Uniform quantization to `bits`-bit integers.

    granularity: what shares one scale. "channel" is an output channel of a weight, "token" a row of an activation.
    symmetric: no zero point.   dynamic: the scale is found at run time from the tensor itself.
    """

    bits: int
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(
                f"bits must be between 2 and 8, got {self.bits}; 16 (not rounded) is the absence of a scheme"
            )
        if self.granularity == "token" and not self.dynamic:
            raise ValueError("granularity 'token' needs dynamic=True: a static scale cannot know the tokens to come")
        if self.dynamic and not self.symmetric:
            raise ValueError("a dynamic scheme is symmetric: the integer kernels carry no zero point a token")

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1
