# SPDX-License-Identifier: Apache-2.0
"""Carries out a plan for one linear: fold in fp64, round once, fill the quantized layer.

Notation: N out_features, K in_features, G timestep groups.
"""

import diffusers_dq_kernels as ops
import torch
from torch import Tensor, nn

from diffusers_dq import affine
from diffusers_dq.linear import LinearLayout, QuantizedLinear
from diffusers_dq.planning import LinearPlan
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.timesteps import TimestepGroups, expand


@torch.no_grad()
def build_linear(
    linear: nn.Linear, plan: LinearPlan, partition: int, groups: TimestepGroups, dtype: torch.dtype
) -> QuantizedLinear:
    """The quantized layer of a plan; `linear` is only read, and its bias shared where the plan leaves it alone.

    partition: which entry of `groups.index` is the plan's.   dtype: of a weight that is not rounded.
    """
    tables = _online_tables(plan, linear.in_features) | _range_tables(plan)
    weight, bias = _folded(linear, plan)
    if bias is not None:
        tables["bias_groups"] = bias
    weight, tables["weight_scale"] = _rounded(weight, plan)
    layout = LinearLayout(
        weight_bits=plan.bits.weight,
        activation_bits=plan.bits.activation,
        dynamic=plan.scheme is not None and plan.scheme.dynamic,
        per_token=plan.scheme is not None and plan.scheme.granularity == "token",
        bias_groups=_rows(tables, "bias_groups"),
        range_groups=_rows(tables, "input_scale"),
        shift_groups=_rows(tables, "input_shift"),
        smooth="input_inv_smooth" in tables,
        partition=partition,
    )
    layer = QuantizedLinear(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        layout,
        groups,
        device=linear.weight.device,
        dtype=dtype,
    )
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    for name, _ in layer.tables():
        getattr(layer, name).copy_(tables[name])
    layer.finish_loading()
    return layer


def _rows(tables: dict[str, Tensor], name: str) -> int:
    return len(tables[name]) if name in tables else 0


def _folded(linear: nn.Linear, plan: LinearPlan) -> tuple[Tensor, Tensor | None]:
    """(W' [N, K], b' [1 or G, N]) in fp64; (W, None) where the plan leaves the function alone."""
    weight = linear.weight.detach().double()
    if not plan.chain.transforms and not plan.rows:
        return weight, None
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().double()
    weight, bias = plan.chain.fold(weight, bias[None])
    bias = expand(bias, plan.chain.boundaries, plan.boundaries)
    for update, boundaries in plan.rows:
        rows = slice(update.start, update.stop)
        multiplier = update.multiplier.to(weight)
        offset = expand(update.offset, boundaries, plan.boundaries)
        weight[rows] *= multiplier[:, None]
        bias = bias.expand(max(len(bias), len(offset)), -1).clone()
        bias[:, rows] = bias[:, rows] * multiplier + offset.to(bias)
    return weight, bias


def _online_tables(plan: LinearPlan, channels: int) -> dict[str, Tensor]:
    """T_g as the quantize step applies it: u = (x - input_shift_g) input_inv_smooth."""
    if not plan.online:
        return {}
    multiplier, offset = plan.chain.as_affine(channels)
    tables = {}
    if (multiplier != 1).any():
        tables["input_inv_smooth"] = multiplier
    if offset.any():
        tables["input_shift"] = expand(-offset / multiplier, plan.chain.boundaries, plan.boundaries)
    return tables


def _range_tables(plan: LinearPlan) -> dict[str, Tensor]:
    if plan.input_range is None:
        return {}
    found = plan.input_range
    return {
        "input_scale": expand(found.scale, found.boundaries, plan.boundaries),
        "input_zero_point": expand(found.zero_point, found.boundaries, plan.boundaries),
    }


def _rounded(weight: Tensor, plan: LinearPlan) -> tuple[Tensor, Tensor]:
    """(weight as stored, scale [N] fp32) of the folded weight [N, K]."""
    if plan.bits.weight > 8:
        return weight, weight.new_ones(len(weight))
    scheme = QuantScheme(bits=plan.bits.weight, granularity="channel")
    weight = weight.float()
    scale = affine.weight_parameters(weight, scheme, plan.search)
    q = affine.quantize(weight, scale[:, None], 0, scheme)
    return (ops.pack_int4(q) if plan.bits.weight == 4 else q), scale
