# SPDX-License-Identifier: Apache-2.0
"""What a user may limit, over all linears that the configuration converts.

Storage is that of costs.stored_bits: integers, scales and zero points of weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from diffusers_dq.costs import Choice
from diffusers_dq.scheme import fitting_group

ROUNDED_UP = 1 + 1e-12  # so that a limit worked out from a uniform configuration allows just that one, in any order


@dataclass(frozen=True)
class MeanBits:
    """Bits a weight takes in the file on average, its share of scales and zero points counted."""

    bits: float

    def stored_bits(self, weights: int) -> float:
        return self.bits * weights


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of all weights in the file, with scales and zero points."""

    nbytes: int

    def stored_bits(self, weights: int) -> float:
        return 8.0 * self.nbytes


@dataclass(frozen=True)
class ShareOfBF16:
    """Bytes of all weights, with scales and zero points, relative to the same weights in bf16."""

    share: float

    def stored_bits(self, weights: int) -> float:
        return 16 * self.share * weights


@dataclass(frozen=True)
class BitOpsOf:
    """BitOps of a forward (costs.bitops), as many as with groups of `group_size` in all layers, times `factor`."""

    group_size: int
    factor: float = 1.0

    def choice(self, own: Choice, in_features: int) -> Choice:
        """A linear's share of the limit: its own bits in groups of this size, or of the next legal one below."""
        return replace(own, group_size=fitting_group(in_features, self.group_size) or 0)


@dataclass(frozen=True)
class LayerCost:
    """Any cost that adds up over linears, such as milliseconds that a user measured.

    cost: of a linear's name and a Choice.   most: that the sum may be.   unit: for messages.
    """

    cost: Callable[[str, Choice], float]
    most: float
    unit: str = ""


StorageLimit = MeanBits | StoredBytes | ShareOfBF16
Budget = StorageLimit | LayerCost


def checked_budget(budget: object) -> Budget:
    """A number is a MeanBits. Raises TypeError for what is no budget, ValueError for storage not above zero."""
    if isinstance(budget, (int, float)) and not isinstance(budget, bool):
        budget = MeanBits(float(budget))
    if not isinstance(budget, Budget):
        raise TypeError(
            "a budget is a number of mean bits a weight, MeanBits, StoredBytes, ShareOfBF16 or LayerCost; got"
            f" {budget!r}"
        )
    if not isinstance(budget, LayerCost) and not budget.stored_bits(1) > 0:
        raise ValueError(f"a budget must be above zero, got {budget!r}")
    return budget


def priced(
    budget: Budget, stored_bits: Callable[[str, Choice], float], weights: int
) -> tuple[Callable[[str, Choice], float], float, str]:
    """(cost of a linear's choice, the most of their sum, its unit).   weights: their number in all linears."""
    if isinstance(budget, LayerCost):
        return budget.cost, budget.most, budget.unit
    return stored_bits, ROUNDED_UP * budget.stored_bits(weights), "bits of weights"
