# SPDX-License-Identifier: Apache-2.0
"""LayerNorm, RMSNorm or GELU, then `quantize_static` or `quantize_dynamic`, in one pass over memory.

    norm_quantize    x = norm(h) * (1 + modulation_scale[r]) + modulation_shift[r]
    gelu_quantize    x = GELU(h), tanh form

For eager mode, where what comes before a linear is otherwise three or four kernels. In fp32 up to the integers, where
separate ops would round to h's dtype between each other. Integers of the forms differ by one where u / scale is close
to a half, as after a rotation. The shared arguments are those of quantize.py.
"""

from typing import Any

from torch import Tensor

from ._producers import Gelu, Norm
from ._quantize_rows import Plan, Results, apply_plan, define_rows_op
from .quantize import INPUT_SCHEMA, ROTATION_SCHEMA, dynamic_plan, static_plan

__all__ = ["gelu_quantize_dynamic", "gelu_quantize_static", "norm_quantize_dynamic", "norm_quantize_static"]

_NORM_SCHEMA = (
    "Tensor h, str kind, float eps, Tensor? weight, Tensor? bias, Tensor? modulation_scale, Tensor? modulation_shift,"
    " bool keep"
)


def norm_static_plan(*parameters: Any) -> Plan:
    return _after_norm(static_plan(*parameters[7:]), *parameters[:7])


def norm_dynamic_plan(*parameters: Any) -> Plan:
    return _after_norm(dynamic_plan(*parameters[7:]), *parameters[:7])


def gelu_static_plan(*parameters: Any) -> Plan:
    return static_plan(*parameters)._replace(producer=Gelu())


def gelu_dynamic_plan(*parameters: Any) -> Plan:
    return dynamic_plan(*parameters)._replace(producer=Gelu())


def _after_norm(plan: Plan, *parameters: Any) -> Plan:
    *norm, keep = parameters
    return plan._replace(producer=Norm(*norm), keep=keep)


def norm_quantize_static_reference(h: Tensor, *parameters: Any) -> Results:
    """Normalize, modulate, and quantize as `quantize_static` does.

    h: [..., K] float.   parameters: kind ("layer" or "rms"), eps, weight [K] float or None, bias [K] float or None,
    modulation_scale and modulation_shift [R, K] float or None, keep, then those of `quantize_static`.
    R divides the number of rows M, and row m takes row m // (M / R) of a modulation.   keep: also return x.
    Returns [..., K] int8, and x [..., K] rounded to h's dtype, or (0,) without `keep`.
    """
    return apply_plan(h, norm_static_plan(*parameters))


def norm_quantize_dynamic_reference(h: Tensor, *parameters: Any) -> Results:
    """Normalize, modulate, and quantize as `quantize_dynamic` does.

    h, parameters up to keep: as in `norm_quantize_static`, then those of `quantize_dynamic`.
    Returns [..., K] int8, the scales [...] fp32, and x [..., K] rounded to h's dtype, or (0,) without `keep`.
    """
    return apply_plan(h, norm_dynamic_plan(*parameters))


def gelu_quantize_static_reference(h: Tensor, *parameters: Any) -> Results:
    """GELU, then quantize as `quantize_static` does.   parameters: its.   Returns int8 [..., K]."""
    return apply_plan(h, gelu_static_plan(*parameters))


def gelu_quantize_dynamic_reference(h: Tensor, *parameters: Any) -> Results:
    """GELU, then quantize as `quantize_dynamic` does.   parameters: its.   Returns int8 [..., K] and scales fp32."""
    return apply_plan(h, gelu_dynamic_plan(*parameters))


norm_quantize_static = define_rows_op(
    f"norm_quantize_static({_NORM_SCHEMA}, Tensor scale, Tensor zero_point, {INPUT_SCHEMA}, {ROTATION_SCHEMA})"
    " -> (Tensor, Tensor)",
    norm_quantize_static_reference,
    norm_static_plan,
)

norm_quantize_dynamic = define_rows_op(
    f"norm_quantize_dynamic({_NORM_SCHEMA}, {INPUT_SCHEMA}, {ROTATION_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    norm_quantize_dynamic_reference,
    norm_dynamic_plan,
)

gelu_quantize_static = define_rows_op(
    f"gelu_quantize_static(Tensor h, Tensor scale, Tensor zero_point, {INPUT_SCHEMA}, {ROTATION_SCHEMA}) -> Tensor",
    gelu_quantize_static_reference,
    gelu_static_plan,
)

gelu_quantize_dynamic = define_rows_op(
    f"gelu_quantize_dynamic(Tensor h, {INPUT_SCHEMA}, {ROTATION_SCHEMA}) -> (Tensor, Tensor)",
    gelu_quantize_dynamic_reference,
    gelu_dynamic_plan,
)
