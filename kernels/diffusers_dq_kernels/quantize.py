# SPDX-License-Identifier: Apache-2.0
"""Activations to int8, with the shift, the smoothing and the rotation of the current timestep group on the way.

    u = ((x - shift[g]) * inv_smooth) R
    q = clamp(round(u / scale) + zero_point, -2^(bits - 1), 2^(bits - 1) - 1)

All of it in fp32 and in this order, rounding half to even: without a rotation every form gives the same integers. With
one, sums are taken in different orders, and an integer differs by one where u / scale is that close to a half.

What the ops share, M rows, K in_features, G timestep groups, where a table of one row serves every group:

group: [1] int64.   shift: [1 or G, K] fp32 or None.   inv_smooth: [K] fp32 or None.   bits: 2 to 8.
rotation_signs: [K] int8 of +-1, or None for no rotation.   rotation_order: of the rotation (hadamard.py), else 1.
"""

from typing import Any

from torch import Tensor

from ._input_transform import InputTransform
from ._quantize_rows import Plan, Results, apply_plan, define_rows_op
from ._rounding import Rounding

__all__ = ["INPUT_SCHEMA", "ROTATION_SCHEMA", "dynamic_plan", "grouped_plan", "static_plan"]
__all__ += ["quantize_dynamic", "quantize_grouped", "quantize_static"]

INPUT_SCHEMA = "Tensor group, Tensor? shift, Tensor? inv_smooth, int bits"
ROTATION_SCHEMA = "Tensor? rotation_signs=None, int rotation_order=1"


def static_plan(scale: Tensor, zero_point: Tensor, *parameters: Any) -> Plan:
    transform, bits = _transform_and_bits(*parameters)
    return Plan(Rounding(bits, scale, zero_point), transform)


def dynamic_plan(*parameters: Any) -> Plan:
    transform, bits = _transform_and_bits(*parameters)
    return Plan(Rounding(bits), transform)


def grouped_plan(
    group: Tensor,
    shift: Tensor | None,
    inv_smooth: Tensor | None,
    bits: int,
    group_size: int,
    symmetric: bool,
    *rotation: Any,
) -> Plan:
    rounding = Rounding(bits, group_size=group_size, symmetric=symmetric)
    return Plan(rounding, InputTransform(group, shift, inv_smooth, *rotation))


def _transform_and_bits(
    group: Tensor, shift: Tensor | None, inv_smooth: Tensor | None, bits: int, *rotation: Any
) -> tuple[InputTransform, int]:
    return InputTransform(group, shift, inv_smooth, *rotation), bits


def quantize_static_reference(x: Tensor, *parameters: Any) -> Results:
    """Quantize with calibrated parameters, one scale and zero point a timestep group.

    x: [..., K] float.   parameters: scale [1 or G] fp32, zero_point [1 or G] int32, group, shift, inv_smooth, bits,
    rotation_signs=None, rotation_order=1.   Returns [..., K] int8.
    """
    return apply_plan(x, static_plan(*parameters))


def quantize_dynamic_reference(x: Tensor, *parameters: Any) -> Results:
    """Quantize each row with its own largest absolute value, symmetric.

    x: [..., K] float.   parameters: group, shift, inv_smooth, bits, rotation_signs=None, rotation_order=1.
    Returns [..., K] int8 and the scales [...] fp32.
    """
    return apply_plan(x, dynamic_plan(*parameters))


def quantize_grouped_reference(x: Tensor, *parameters: Any) -> Results:
    """Quantize each group of channels of each row with its own range (Q-DiT, CVPR 2025).

    x: [..., K] float.   parameters: group, shift, inv_smooth, bits, group_size, symmetric, rotation_signs=None,
    rotation_order=1.   group_size: of channels, a multiple of 32 that divides K.   symmetric: by the largest absolute
    value, with zero points of 0; else by smallest and largest, in a range that contains 0.
    Returns [..., K] int8, scales [..., K / group_size] fp32 and zero points [..., K / group_size] int32.
    """
    return apply_plan(x, grouped_plan(*parameters))


quantize_static = define_rows_op(
    f"quantize_static(Tensor x, Tensor scale, Tensor zero_point, {INPUT_SCHEMA}, {ROTATION_SCHEMA}) -> Tensor",
    quantize_static_reference,
    static_plan,
)

quantize_dynamic = define_rows_op(
    f"quantize_dynamic(Tensor x, {INPUT_SCHEMA}, {ROTATION_SCHEMA}) -> (Tensor, Tensor)",
    quantize_dynamic_reference,
    dynamic_plan,
)

quantize_grouped = define_rows_op(
    f"quantize_grouped(Tensor x, {INPUT_SCHEMA}, int group_size, bool symmetric, {ROTATION_SCHEMA})"
    " -> (Tensor, Tensor, Tensor)",
    quantize_grouped_reference,
    grouped_plan,
)
