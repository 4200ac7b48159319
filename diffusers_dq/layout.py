# SPDX-License-Identifier: Apache-2.0
"""What is known of a quantized layer before its tensors are, as config.json has it: bits, granularity, tables.

Shapes: K in_features, G timestep groups.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import diffusers_dq_kernels as ops

NOT_ROUNDED = 16
WEIGHT_BITS = (4, 6, 8, NOT_ROUNDED)
ACTIVATION_BITS = (4, 5, 6, 7, 8, NOT_ROUNDED)
InputRounding = Literal["static", "token", "tensor", "group"]
INPUT_ROUNDINGS = get_args(InputRounding)


@dataclass(frozen=True)
class Bits:
    """Bits of a linear's weight and input; 16 is not rounded."""

    weight: int
    activation: int

    def __post_init__(self) -> None:
        for name, value, known in (
            ("weight_bits", self.weight, WEIGHT_BITS),
            ("activation_bits", self.activation, ACTIVATION_BITS),
        ):
            if type(value) is not int or value not in known:
                raise ValueError(f"{name} must be one of the integers {known} (16: not rounded), got {value!r}")
        if self.weight == NOT_ROUNDED and self.activation != NOT_ROUNDED:
            raise ValueError(
                f"weight_bits=16 with activation_bits={self.activation} has no integer product; round the weight too"
                " (4, 6 or 8), or set both to 16 to apply a method's transforms alone"
            )


@dataclass(frozen=True, kw_only=True)
class LinearLayout:
    """Which tensors a QuantizedLinear has and how it computes: all that must be known before its weights are.

    weight_bits, activation_bits: 16 is not rounded.
    input_rounding: "static", by calibrated scales; "token", "tensor" or "group", by scales found at run time for each
        token, the whole input, or each group of channels of each token; None where it is not rounded.
    group_size: input channels of a row of the weight, and with "group" of a token, that share a scale; 0 is all.
    weight_zero_points, input_zero_points: whether groups have them.
    bias_groups, range_groups, shift_groups: rows of the tables of biases, input scales and input shifts; 0 where there
        is no such table (bias_groups 0: an ordinary bias or none), 1 where all groups share a row.
    smooth: the input is divided by a vector online.   rotation_order: of the Hadamard matrix that then mixes its
        channels, 1 for none.   low_rank: rank of a part of the weight that is not rounded, 0 for none.
    partition: which entry of TimestepGroups.index applies.
    input_carried: the input arrives transformed, by something upstream.   carries: the output leaves transformed, for
        what reads it. Neither changes what the layer computes; an adapter beside it would be wrong (guards.py).
    """

    weight_bits: int
    activation_bits: int
    input_rounding: InputRounding | None = None
    group_size: int = 0
    weight_zero_points: bool = False
    input_zero_points: bool = False
    bias_groups: int = 0
    range_groups: int = 0
    shift_groups: int = 0
    smooth: bool = False
    rotation_order: int = 1
    low_rank: int = 0
    partition: int = 0
    input_carried: bool = False
    carries: bool = False

    def __post_init__(self) -> None:
        Bits(self.weight_bits, self.activation_bits)
        known = (None,) if self.activation_bits == NOT_ROUNDED else INPUT_ROUNDINGS
        if self.input_rounding not in known:
            raise ValueError(
                f"input_rounding with activation_bits={self.activation_bits} must be one of {known},"
                f" got {self.input_rounding!r}"
            )
        by_group = self.input_rounding == "group" or self.weight_zero_points or self.input_zero_points
        if by_group and not self.group_size:
            raise ValueError("rounding by group and zero points of groups need a group_size")
        of_tables = "bias_groups", "range_groups", "shift_groups"
        for name in (*of_tables, "group_size", "rotation_order", "low_rank", "partition"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        for name in ("smooth", "weight_zero_points", "input_zero_points", "input_carried", "carries"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.static != (self.range_groups > 0):
            raise ValueError(
                f"range_groups is {self.range_groups} with input_rounding {self.input_rounding!r}: static has ranges"
            )
        if self.weight_zero_points and self.weight_bits > 4:
            raise ValueError(f"weight_zero_points need 4-bit weights, got {self.weight_bits}: q - z must fit in int8")

    def check_width(self, in_features: int) -> None:
        """Raises ValueError for groups or rotations that do not fit a linear of this width."""
        if self.group_size and in_features % self.group_size:
            raise ValueError(f"group_size {self.group_size} does not divide the {in_features} in_features")
        if self.rotation_order != 1:
            ops.check_order(self.rotation_order, in_features)

    @property
    def rounds_weight(self) -> bool:
        return self.weight_bits < NOT_ROUNDED

    @property
    def rounds_input(self) -> bool:
        return self.activation_bits < NOT_ROUNDED

    @property
    def static(self) -> bool:
        return self.input_rounding == "static"

    @property
    def of_input(self) -> "LinearLayout":
        """What it says of the input alone: equal for linears that do the same to theirs."""
        size = self.group_size if self.input_rounding == "group" else 0
        return replace(
            self,
            weight_bits=8,
            bias_groups=0,
            group_size=size,
            weight_zero_points=False,
            low_rank=0,
            carries=False,
        )

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults: config.json holds one a linear."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
