# SPDX-License-Identifier: Apache-2.0
"""Carries out a plan for one linear or modulation: fold in fp64, round once, fill the quantized layer.

Notation: N out_features, K in_features, G timestep groups.
"""

import torch
from torch import Tensor, nn

import diffusers_dq_kernels as ops
from diffusers_dq import affine
from diffusers_dq.affine import QuantizedWeight
from diffusers_dq.gptq import quantize_weight_gptq
from diffusers_dq.layout import InputRounding, LinearLayout
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.low_rank import is_worth_it, low_rank_factors
from diffusers_dq.modulation import Modulation, ModulationLayout
from diffusers_dq.planning import LinearPlan, ModulationPlan
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.specs import ModulationArgument
from diffusers_dq.timesteps import TimestepGroups, expand, group_of


@torch.no_grad()
def build_linear(
    linear: nn.Linear, plan: LinearPlan, partition: int, groups: TimestepGroups, dtype: torch.dtype, rows: int = 1
) -> QuantizedLinear:
    """The quantized layer of a plan; `linear` is only read, and its bias shared where the plan leaves it alone.

    partition: which entry of `groups.index` is the plan's.   dtype: of a weight that is not rounded.
    rows: that every table which switches with the timestep is to have at least, the last one repeated: tables of one
    size in all blocks let them share a compiled graph.
    """
    tables = _online_tables(plan, linear.in_features) | _range_tables(plan)
    exact, bias = folded(linear, plan)
    factors = low_rank_of(exact, plan)
    if factors is not None:
        exact = exact - factors[1] @ factors[0]
    rounded = _rounded(exact, plan)
    weight = exact if rounded is None else rounded.integers
    if rounded is not None:
        tables["weight_scale"] = rounded.scale
        if rounded.zero_point is not None:
            tables["weight_zero_point"] = rounded.zero_point
    correction = None if rounded is None else _bias_correction(exact, rounded, tables, plan)
    if bias is None and correction is not None:
        bias = _bias_of(linear)[None]
    if bias is not None:
        tables["bias_groups"] = bias if correction is None else bias + correction
    if factors is not None:
        factors = _on_arrival(*factors, tables, plan)
    tables = {name: _lengthened(table, rows) if name in _SWITCHED else table for name, table in tables.items()}
    layout = LinearLayout(
        weight_bits=plan.bits.weight,
        activation_bits=plan.bits.activation,
        input_rounding=_input_rounding(plan.scheme),
        group_size=_group_size(plan),
        weight_zero_points="weight_zero_point" in tables,
        input_zero_points=plan.scheme is not None and plan.scheme.granularity == "group" and not plan.scheme.symmetric,
        bias_groups=_rows(tables, "bias_groups"),
        range_groups=_rows(tables, "input_scale"),
        shift_groups=_rows(tables, "input_shift"),
        smooth="input_inv_smooth" in tables,
        rotation_order=1 if plan.chain.rotation is None else plan.chain.rotation.order,
        low_rank=plan.recipe.low_rank if factors is not None else 0,
        partition=partition,
        input_carried=bool(plan.chain.transforms) and not plan.online,
        carries=bool(plan.rows),
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
    layer.weight.copy_(ops.pack_int4(weight) if plan.bits.weight == 4 else weight)
    if layer.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    if factors is not None and layer.low_rank_down is not None and layer.low_rank_up is not None:
        layer.low_rank_down.copy_(factors[0])
        layer.low_rank_up.copy_(factors[1])
    for name, _ in layer.tables():
        getattr(layer, name).copy_(tables[name])
    layer.finish_loading()
    return layer


def low_rank_of(exact: Tensor, plan: LinearPlan) -> tuple[Tensor, Tensor] | None:
    """Factors [r, K] and [N, r] of the part of the folded weight that is not rounded; None where all of it is, and for
    a rank so high that factors would be larger than the weight."""
    if plan.weight_scheme is None or not is_worth_it(plan.recipe.low_rank, exact.shape):
        return None
    return low_rank_factors(exact, plan.recipe.low_rank)


def _on_arrival(down: Tensor, up: Tensor, tables: dict[str, Tensor], plan: LinearPlan) -> tuple[Tensor, Tensor]:
    """The factors for the input as it arrives, before what the layer itself does to it.

    u = ((x - shift_g) inv_smooth) R, so D u = D' x - D' shift_g with D' = D R^T diag(inv_smooth). The biases take up
    the constant: there are some wherever something is shifted.
    """
    if plan.chain.rotation is not None:
        down = plan.chain.rotation.inverse(down)
    if "input_inv_smooth" in tables:
        down = down * tables["input_inv_smooth"].to(down)
    if "input_shift" in tables:
        constant = tables["input_shift"].to(down) @ down.T @ up.T
        tables["bias_groups"] = tables["bias_groups"] - constant
    return down, up


def _input_rounding(scheme: QuantScheme | None) -> InputRounding | None:
    if scheme is None:
        return None
    if not scheme.dynamic:
        return "static"
    assert scheme.granularity != "channel"
    return scheme.granularity


def _group_size(plan: LinearPlan) -> int:
    """Of weight and input, whose integers are multiplied group by group; 0 where neither has groups."""
    weight, of_input = (scheme and scheme.group_size for scheme in (plan.weight_scheme, plan.scheme))
    if of_input and of_input != weight:
        raise ValueError(f"an input in groups of {of_input} channels needs a weight in the same groups, not {weight}")
    return weight or 0


def build_modulation(
    model: nn.Module,
    of: ModulationArgument,
    plan: ModulationPlan,
    partition: int,
    groups: TimestepGroups,
    dtype: torch.dtype,
    rows: int = 1,
) -> Modulation:
    """What changes the modulation y that a block is called with: with the block's own table,
    table + y' = m (table + y) + a_g. Arguments as in `build_linear`."""
    update, _ = plan.rows[0]
    channels = of.chunks * (update.stop - update.start)
    multiplier = torch.ones(channels, dtype=torch.float64)
    offset = torch.zeros(len(plan.boundaries) + 1, channels, dtype=torch.float64)
    for update, boundaries in plan.rows:
        here = slice(update.start, update.stop)
        multiplier[here] = update.multiplier
        offset[:, here] = expand(update.offset, boundaries, plan.boundaries)
    block = model.get_submodule(of.block)
    table = None if of.table is None else getattr(block, of.table).detach()
    if table is not None:
        offset += (multiplier - 1) * table.reshape(-1)[:channels].to(offset)
    if bool((offset == offset[:1]).all()):
        offset = offset[:1]
    offset = _lengthened(offset, rows)
    layout = ModulationLayout(
        argument=of.argument, channels=channels, offset_groups=len(offset), partition=partition, axis=of.axis
    )
    device = next(block.parameters()).device
    modulation = Modulation(layout, groups, device=device, dtype=dtype)
    modulation.multiplier.copy_(multiplier)
    modulation.offset.copy_(offset)
    return modulation


_SWITCHED = ("bias_groups", "input_scale", "input_zero_point", "input_shift")


def _lengthened(table: Tensor, rows: int) -> Tensor:
    if not 1 < len(table) < rows:
        return table
    return torch.cat([table, table[-1:].expand(rows - len(table), *table.shape[1:])])


def _rows(tables: dict[str, Tensor], name: str) -> int:
    return len(tables[name]) if name in tables else 0


def folded(linear: nn.Linear, plan: LinearPlan) -> tuple[Tensor, Tensor | None]:
    """(W' [N, K], b' [1 or G, N]) in fp64; (W, None) where the plan leaves the function alone."""
    weight = linear.weight.detach().double()
    if not plan.chain.every and not plan.rows:
        return weight, None
    weight, bias = plan.chain.fold(weight, _bias_of(linear)[None])
    bias = expand(bias, plan.chain.boundaries, plan.boundaries)
    for update, boundaries in plan.rows:
        rows = slice(update.start, update.stop)
        multiplier = update.multiplier.to(weight)
        offset = expand(update.offset, boundaries, plan.boundaries)
        weight[rows] *= multiplier[:, None]
        bias = bias.expand(max(len(bias), len(offset)), -1).clone()
        bias[:, rows] = bias[:, rows] * multiplier + offset.to(bias)
    return weight, bias


def _bias_of(linear: nn.Linear) -> Tensor:
    """[N] fp64."""
    if linear.bias is None:
        return torch.zeros(linear.out_features, dtype=torch.float64, device=linear.weight.device)
    return linear.bias.detach().double()


def _online_tables(plan: LinearPlan, channels: int) -> dict[str, Tensor]:
    """T_g as the quantize step applies it: u = ((x - input_shift_g) input_inv_smooth) R."""
    tables = {}
    if plan.chain.rotation is not None:
        tables["rotation_signs"] = plan.chain.rotation.signs
    if not plan.online:
        return tables
    multiplier, offset = plan.chain.as_affine(channels)
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


def _rounded(weight: Tensor, plan: LinearPlan) -> QuantizedWeight | None:
    """The folded weight [N, K] as integers; None where it is not rounded."""
    if plan.weight_scheme is None or plan.decided is not None:
        return plan.decided
    if plan.lacks_moments:
        raise ValueError('rounding="gptq" needs sums of x x^T: calibrate with second_moments=True')
    weight = weight.float()
    if plan.moments is not None:
        hessian = plan.moments.transformed(plan.chain, plan.boundaries if plan.recipe.output_correction else None)
        search = "minmax" if plan.recipe.search == "output" else plan.recipe.search
        return quantize_weight_gptq(weight, hessian.to(weight.device), plan.weight_scheme, search)
    importance = None if plan.sample is None else _spread(plan).to(weight)
    rounded = affine.quantize_weight(weight, plan.weight_scheme, plan.recipe.search, importance)
    if plan.recipe.output_correction and importance is not None:
        gain = _gain(weight, rounded.dequantized(), importance)
        rounded = rounded._replace(scale=rounded.scale * (gain if rounded.scale.ndim == 1 else gain[:, None]))
    return rounded


_GAINS = 0.8, 1.25  # what shrinkage can explain; on trained weights 0.99 to 1.14 were seen


def _gain(weight: Tensor, rounded: Tensor, importance: Tensor) -> Tensor:
    """[N]: what W^ has to be multiplied by so that its output is W''s and an error uncorrelated with it.

    gamma_n = sum_k h_k^2 W'_nk^2 / sum_k h_k^2 W'_nk W^_nk, with h [K] the size of the inputs, taken as uncorrelated.
    Clipped ranges shrink a weight, and what every step shrinks adds up over a trajectory, unlike rounding noise.
    """
    squares = importance.square()
    wanted, got = (squares * weight.square()).sum(1), (squares * weight * rounded).sum(1)
    return torch.where(got > 0, wanted / got, torch.ones_like(got)).clamp(*_GAINS)


def _spread(plan: LinearPlan) -> Tensor:
    """[K]: root mean square of each channel of u; about its mean in a group where the bias takes care of the mean."""
    assert plan.sample is not None
    u = plan.sample.transformed(plan.chain)
    if plan.recipe.output_correction:
        u = torch.cat([part - part.mean(dim=(0, 1)) for part in _by_group(u, plan)])
    return u.square().mean(dim=(0, 1)).sqrt()


def _by_group(u: Tensor, plan: LinearPlan) -> list[Tensor]:
    """u [S, R, K] cut into the timestep groups of the plan's tables."""
    assert plan.sample is not None
    group = group_of(plan.sample.timesteps, plan.boundaries)
    return [u[group == g] for g in range(len(plan.boundaries) + 1)]


def _bias_correction(
    exact: Tensor, weight: QuantizedWeight, tables: dict[str, Tensor], plan: LinearPlan
) -> Tensor | None:
    """E[u] W'^T - E[u^] W^^T over the sampled tokens of each group, [1 or G, N] fp64; None where not asked for.

    W' [N, K] is the folded weight, W^ its rounded form, u^ the rounded input: added to the bias it removes the mean
    error of the output, that of clipping included.
    """
    if not plan.recipe.output_correction or plan.sample is None:
        return None
    rounded = weight.dequantized(torch.float64)
    exact_means = None if plan.moments is None else plan.moments.means(plan.chain, plan.boundaries)
    rows = []
    for g, u in enumerate(_by_group(plan.sample.transformed(plan.chain), plan)):
        u_rounded = u
        if plan.input_range is not None and plan.scheme is not None:
            row = min(g, len(tables["input_scale"]) - 1)
            scale, zero_point = tables["input_scale"][row], tables["input_zero_point"][row]
            u_rounded = affine.rounded(u, scale, zero_point, plan.scheme)
        mean, mean_rounded = (part.double().mean(dim=(0, 1)).to(exact) for part in (u, u_rounded))
        if exact_means is not None:  # of every token; the sample then tells of the rounding alone
            mean, mean_rounded = exact_means[g].to(exact), exact_means[g].to(exact) + mean_rounded - mean
        rows.append(mean @ exact.T - mean_rounded @ rounded.T)
    return torch.stack(rows)
