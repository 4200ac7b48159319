# SPDX-License-Identifier: Apache-2.0
"""What a choice for a linear costs: bits in the file, and BitOps.

Notation: N out_features, K in_features, T tokens a forward, g group size, bW and bA bits of weight and input.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers_dq.scheme import GROUP_MULTIPLE, QuantScheme

SCALE_BITS = 32  # a scale is fp32 in the file
ZERO_POINT_BITS = 8  # and a zero point int8
FLOAT_COST = 32  # of a rescale-accumulate of 32-bit floats, in BitOps a bit: as a product of 32 by 32 bits


@dataclass(frozen=True, order=True)
class Choice:
    """One way to round a linear, as `DQConfig.overrides` says it.   group_size: 0 is one scale a row."""

    weight_bits: int
    activation_bits: int
    group_size: int = 0

    @property
    def override(self) -> dict[str, int]:
        return {
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "group_size": self.group_size,
        }

    def __str__(self) -> str:
        group = f"g{self.group_size}" if self.group_size else ""
        return f"W{self.weight_bits}A{self.activation_bits}{group}"


def legal_group_sizes(in_features: int, sizes: Sequence[int] | None = None) -> tuple[int, ...]:
    """Divisors of K that are multiples of 32, ascending; of `sizes` where given. () where there is none."""
    tried = range(GROUP_MULTIPLE, in_features + 1, GROUP_MULTIPLE) if sizes is None else sorted(set(sizes))
    return tuple(g for g in tried if g >= GROUP_MULTIPLE and g % GROUP_MULTIPLE == 0 and in_features % g == 0)


def bitops(
    out_features: int,
    in_features: int,
    tokens: float,
    weight_bits: int,
    activation_bits: int,
    group_size: int = 0,
    float_cost: int = FLOAT_COST,
) -> float:
    """BitOps = T N K bW bA + T N (K / g) 32 c, the limit of Q-DiT's Algorithm 1 with the cost of groups counted.

    The paper's own count is the first term, which does not depend on g; the second is the rescale and accumulation in
    fp32 after each group.   tokens: of one forward.   group_size: 0 is one scale a row.   float_cost: c.
    """
    products = in_features * weight_bits * activation_bits
    groups = in_features // group_size if group_size else 1
    return tokens * out_features * (products + groups * 32 * float_cost)


def stored_bits(scheme: QuantScheme | None, out_features: int, in_features: int, unrounded_bits: int = 16) -> int:
    """Bits of a weight [N, K] in the file: integers, fp32 scales and int8 zero points.

    scheme: of the weight; None is not rounded, `unrounded_bits` each. Bias, tables of the input and a low-rank branch,
    which do not depend on the choice, are left out.
    """
    values = out_features * in_features
    if scheme is None:
        return values * unrounded_bits
    rows = out_features * (in_features // scheme.group_size if scheme.group_size else 1)
    return values * scheme.bits + rows * (SCALE_BITS + (0 if scheme.symmetric else ZERO_POINT_BITS))
