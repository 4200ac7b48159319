# SPDX-License-Identifier: Apache-2.0
"""From a method's choices to a plan for every linear. Nothing is changed here: building.py carries a plan out.

Every transform is an affine change of a group's input, so a linear meets at most two kinds: the columns of its weight
take the change of its own input, its rows the changes of what it produces. They commute: the order of layers is free.
A rotation is always made by the quantize step, what acts on channels alone upstream where something can carry it.

Notation: K in_features, G timestep groups, S calibrated steps, R tokens a step.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from diffusers_dq import affine, attention
from diffusers_dq.attention import Softmax
from diffusers_dq.config import Bits, DQConfig
from diffusers_dq.inputs import InputMoments, InputRange, InputSample, static_range
from diffusers_dq.layout import NOT_ROUNDED
from diffusers_dq.low_rank import is_worth_it
from diffusers_dq.methods import Method, Site, Solution
from diffusers_dq.recipe import Recipe
from diffusers_dq.replay import Replay
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.specs import LinearGroup, ModelSpec, ModulatedNorm, ModulationArgument, RowUpdate, ValueProjection
from diffusers_dq.statistics import SiteStatistics, Statistics
from diffusers_dq.step_policy import StepBits
from diffusers_dq.timesteps import Boundaries, TimestepGroups, refine
from diffusers_dq.transforms import Chain, Scale

Rows: TypeAlias = "tuple[tuple[RowUpdate, Boundaries], ...]"  # changes of an output, each with its offsets' partition


@dataclass(frozen=True)
class ModulationPlan:
    """What becomes of the modulation that a block is called with.   rows: never empty."""

    rows: Rows

    @property
    def boundaries(self) -> Boundaries:
        return refine(*(boundaries for _, boundaries in self.rows))


@dataclass(frozen=True)
class LinearPlan:
    """All that turns one nn.Linear into a QuantizedLinear.

    weight_scheme, scheme: of weight and input, None where not rounded.
    chain: the change of its input.   online: made by the layer itself, not upstream, as its rotation always is.
    note: why, where it might be.
    rows: changes of its own output that groups downstream ask for.
    recipe: how the weight is rounded.   decided: the rounded weight, once reconstruction has learned it.
    sample, moments: of its input before the chain.
    """

    weight_scheme: QuantScheme | None = None
    scheme: QuantScheme | None = None
    chain: Chain = Chain()
    online: bool = False
    rows: Rows = ()
    input_range: InputRange | None = None
    recipe: Recipe = Recipe()
    decided: affine.QuantizedWeight | None = None
    sample: InputSample | None = None
    moments: InputMoments | None = None
    note: str = ""

    def noted(self, note: str | None) -> "LinearPlan":
        """With one more note."""
        return replace(self, note="; ".join(filter(None, (self.note, note))))

    @property
    def bits(self) -> Bits:
        weight, activation = (
            NOT_ROUNDED if scheme is None else scheme.bits for scheme in (self.weight_scheme, self.scheme)
        )
        return Bits(weight, activation)

    @property
    def lacks_moments(self) -> bool:
        """Whether GPTQ is to round the weight and does not know the inputs yet."""
        wanted = self.recipe.rounding == "gptq" and self.weight_scheme is not None
        return wanted and self.moments is None and self.decided is None

    @property
    def boundaries(self) -> Boundaries:
        """The common refinement of every partition that some table of this linear follows."""
        ranges = self.input_range.boundaries if self.input_range else ()
        return refine(self.chain.boundaries, ranges, *(boundaries for _, boundaries in self.rows))


@dataclass(frozen=True)
class Plan:
    """linears: by module name.   kept: linear that stays in full precision -> reason.
    attention: Attention module -> operand -> scale [1].   apart: linears that reconstruction takes on their own.
    step_bits: of activations, where they change with the step.
    modulations: that blocks are called with and that have to change."""

    linears: Mapping[str, LinearPlan]
    kept: Mapping[str, str] = field(default_factory=dict)
    attention: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    attention_bits: int = 8
    softmax: Softmax = "uniform"
    apart: frozenset[str] = frozenset()
    step_bits: StepBits | None = None
    modulations: Mapping[ModulationArgument, ModulationPlan] = field(default_factory=dict)

    @property
    def partitions(self) -> list[Boundaries]:
        """Distinct partitions of all linears and modulations; always at least one."""
        followed = {plan.boundaries for plan in self.linears.values()}
        return sorted(followed.union(plan.boundaries for plan in self.modulations.values())) or [()]


def kept_in_full_precision(model: nn.Module, spec: ModelSpec, config: DQConfig) -> dict[str, str]:
    """Linear -> why it stays as it is. Raises ValueError for a skip string or override that matches no linear."""
    known = [linear for group in spec.groups for linear in group.linears]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    skips = spec.not_converted if config.modules_to_not_convert is None else config.modules_to_not_convert
    alone = set(linears) if config.modules_to_not_convert is None else set()
    _check_matches(linears, config)
    kept = {}
    for name in linears:
        skip = next((skip for skip in skips if skip == name or (skip in name and skip not in alone)), None)
        bits = config.bits_of(name)
        if skip is not None:
            whose = "the architecture's" if config.modules_to_not_convert is None else "your"
            kept[name] = f"{skip!r} is in {whose} modules_to_not_convert"
        elif name not in known:
            kept[name] = f"in no group of linears that is known for {type(model).__name__}"
        elif bits.weight == 4 and _in_features(model, name) % 2:
            kept[name] = "in_features is odd, and int4 packs two values of a row in a byte"
        elif bits.weight == 6 and _in_features(model, name) % 4:
            kept[name] = "in_features is no multiple of 4, and a file packs four 6-bit values of a row in three bytes"
    return kept


def _in_features(model: nn.Module, name: str) -> int:
    return _shape(model, name)[1]


def _shape(model: nn.Module, name: str) -> torch.Size:
    """[N, K] of a linear's weight."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return torch.Size((linear.out_features, linear.in_features))


def _check_matches(linears: Sequence[str], config: DQConfig) -> None:
    for skip in config.modules_to_not_convert or ():
        if not any(skip in name for name in linears):
            raise ValueError(
                f"modules_to_not_convert: {skip!r} is part of no linear's name; names look like {linears[:3]}"
            )
    for glob in config.overrides:
        if not fnmatch.filter(linears, glob):
            raise ValueError(f"overrides: {glob!r} matches no linear; names look like {linears[:3]}")


def make_plan(
    model: nn.Module, spec: ModelSpec, method: Method, config: DQConfig, statistics: Statistics | None
) -> Plan:
    """Decide everything and change nothing.

    Raises ValueError where the method needs statistics that are missing, of another model, or lack a layer.
    """
    kept = kept_in_full_precision(model, spec, config)
    _refuse_adapters(model, spec, kept)
    if statistics is not None:
        statistics.check_model(model)
        statistics.check_finite()
    elif config.needs_statistics:
        raise ValueError(f"method {config.method!r} with these options needs statistics: calibrate first")
    plans = {
        name: _first_plan(method, config, name, _shape(model, name), name in spec.weight_only)
        for group in spec.groups
        for name in group.linears
        if name not in kept
    }
    groups = [group for group in spec.groups if any(name in plans for name in group.linears)]
    if statistics is not None:
        _note_unvisited(groups, statistics, plans)
    seen = None
    if config.needs_statistics and statistics is not None:
        seen = statistics.at(method.calibration_steps(statistics.timesteps))
    maxima = None if seen is None else _SampleMaxima(model, seen, [group.name for group in groups])
    sites = [_site(model, group, plans, spec, seen, maxima, config) for group in groups]
    solution = method.solve(sites, None if seen is None else seen.timesteps)
    widths = {site.name: site.weights[0].shape[1] for site in sites}
    enlarged = {
        group.name: _enlarging(solution.chains[group.name], widths[group.name])
        for group in groups
        if isinstance(group.producer, ModulatedNorm) and group.name in solution.chains
    }
    solution = replace(solution, chains={**solution.chains, **enlarged})
    modulations: dict[ModulationArgument, ModulationPlan] = {}
    for group, site in zip(groups, sites, strict=True):
        _place(group, solution, site.weights[0].shape[1], config, plans, modulations)
        if seen is not None and statistics is not None:
            _use_statistics(group, site, seen.timesteps, method, solution, plans)
            if config.recipe.rounding == "gptq":
                _use_moments(group, statistics, plans)
    scales = _attention_scales(spec, config, statistics) if config.quantize_attention else {}
    apart = spec.weight_only if method.rounds_conditioning else frozenset()
    step_bits = _step_bits(config, statistics, plans)
    return Plan(plans, kept, scales, config.activation_bits, method.softmax, apart, step_bits, modulations)


def _step_bits(config: DQConfig, statistics: Statistics | None, plans: Mapping[str, LinearPlan]) -> StepBits | None:
    if not config.has_step_policy or statistics is None:
        return None
    found = StepBits.of_schedule(statistics.timesteps, config.guard_steps or (0, 0), config.step_bits)
    for name, plan in plans.items():
        if found is None or plan.scheme is None or plan.scheme.dynamic:
            continue
        if not {None, NOT_ROUNDED, plan.scheme.bits}.issuperset(found.bits):
            raise ValueError(
                f"step_bits {config.step_bits}: the static range of {name} is for {plan.scheme.bits} bits; use 16"
                " there, or a method with dynamic activations"
            )
    return found


def _refuse_adapters(model: nn.Module, spec: ModelSpec, kept: Mapping[str, str]) -> None:
    for name in (linear for group in spec.groups for linear in group.linears if linear not in kept):
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"{name} is a {type(module).__module__}.{type(module).__name__}, not an nn.Linear: quantizing it would"
                " drop what was put around the weight. Fuse or unload adapters first, or add it to"
                " modules_to_not_convert"
            )


def _first_plan(method: Method, config: DQConfig, name: str, shape: torch.Size, weight_only: bool) -> LinearPlan:
    in_features = shape[1]
    bits, recipe = config.bits_of(name), config.recipe_of(name)
    size = recipe.group_size
    weight = None if bits.weight == NOT_ROUNDED else method.weight_scheme(bits.weight, in_features, size)
    plan = LinearPlan(weight, recipe=recipe)
    if recipe.low_rank and weight is not None and not is_worth_it(recipe.low_rank, shape):
        plan = replace(plan, note=f"no branch of rank {recipe.low_rank}: it would be larger than the weight")
    if bits.activation == NOT_ROUNDED:
        return plan
    if weight_only and not method.rounds_conditioning:
        return plan.noted("input is one vector a sample: weight only")
    return replace(plan, scheme=method.activation_scheme(bits.activation, in_features, size))


def _site(
    model: nn.Module,
    group: LinearGroup,
    plans: Mapping[str, LinearPlan],
    spec: ModelSpec,
    statistics: Statistics | None,
    maxima: "_SampleMaxima | None",
    config: DQConfig,
) -> Site:
    """The group as its method sees it."""
    linears = [model.get_submodule(name) for name in group.linears if name in plans]
    here = [plans[name] for name in group.linears if name in plans]
    schemes = [plan.scheme for plan in here if plan.scheme is not None]
    weight_only = spec.weight_only.issuperset(group.linears)
    return Site(
        name=group.name,
        weights=tuple(linear.weight.detach() for linear in linears),  # type: ignore[operator]
        statistics=None if statistics is None else _statistics_of(group, statistics),
        transformable=not weight_only,
        has_producer=group.producer is not None,
        weight_schemes=tuple(plan.weight_scheme for plan in here),
        scheme=min(schemes, key=lambda scheme: scheme.bits, default=None),
        low_rank=max((plan.recipe.low_rank for plan in here), default=0),
        overridden=any(config.is_overridden(name) for name in group.linears),
        sample_maxima=None if maxima is None else partial(maxima.of, group.name),
    )


class _SampleMaxima:
    """Largest absolute values of each picture in the kept samples, by site; the model runs once, when first asked."""

    def __init__(self, model: nn.Module, statistics: Statistics, sites: Sequence[str]) -> None:
        self.model, self.statistics, self.sites = model, statistics, sites
        self._found: dict[str, list[Tensor]] = {}

    def of(self, site: str) -> Tensor:
        """[n, K] fp32."""
        if not self._found:
            with ExitStack() as stack:
                for name in self.sites:
                    module = self.model.get_submodule(name)
                    stack.callback(module.register_forward_pre_hook(partial(self._observe, name)).remove)
                Replay(self.model, self.statistics, TimestepGroups(), [()]).outputs({})
        return torch.cat(self._found[site])

    def _observe(self, site: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        largest = x.flatten(1, -2).abs().amax(1) if x.ndim > 2 else x.abs()
        self._found.setdefault(site, []).append(largest.float().cpu())


def _note_unvisited(groups: Sequence[LinearGroup], statistics: Statistics, plans: dict[str, LinearPlan]) -> None:
    """Experts of a mixture may see no token at some steps."""
    for group in groups:
        site = statistics.input_of(group.name)
        if site is None or site.visited.all() or not site.visited.any():
            continue
        steps = ", ".join(f"{float(t):g}" for t in statistics.timesteps[~site.visited][:5])
        note = f"not reached at {int((~site.visited).sum())} calibrated timesteps ({steps}): taken as at the nearest"
        for name in (name for name in group.linears if name in plans):
            plans[name] = plans[name].noted(note)


def _statistics_of(group: LinearGroup, statistics: Statistics) -> SiteStatistics:
    site = statistics.input_of(group.name)
    if site is None or not site.visited.any():
        raise ValueError(
            f"{group.name} was never reached during calibration, so its input is unknown; calibrate with calls that"
            " use it, or add it to modules_to_not_convert"
        )
    return site if site.visited.all() else site.filled()


_LEAST = 1 / 64  # fp16 ends at 65504, and what a norm puts out may be enlarged as much


def _enlarging(chain: Chain, channels: int) -> Chain:
    """The chain that a norm's modulation is to carry, times the constant with which it makes no channel smaller.

    The model computes scale' = m scale + (m - 1) in its own dtype and then 1 + scale', whose relative error in bf16 is
    about 2^-9 (1 - m) / m: of a channel that is divided by 30, 29 dB are left. The constant is taken up by the scales
    of what is rounded; integers and products stay the same.
    """
    multiplier, _ = chain.as_affine(channels)
    least = max(float(multiplier.min()), _LEAST)
    if least >= 1:
        return chain
    return replace(chain, transforms=(*chain.transforms, Scale(torch.full_like(multiplier, least))))


def _place(
    group: LinearGroup,
    solution: Solution,
    channels: int,
    config: DQConfig,
    plans: dict[str, LinearPlan],
    modulations: dict[ModulationArgument, ModulationPlan],
) -> None:
    """Give the group's chain to its linears, and its upstream half to the producer or to the quantize step."""
    chain, note = solution.chains.get(group.name), solution.notes.get(group.name)
    scheme = solution.weight_schemes.get(group.name)
    for name in group.linears:
        if note and name in plans:
            plans[name] = plans[name].noted(note)
        if scheme is not None and name in plans:
            plans[name] = replace(plans[name], weight_scheme=scheme)
    if chain is None:
        return
    obstacle = _obstacle(group, chain, config, plans) if chain.transforms else None
    for name in group.linears:
        if name in plans:
            plans[name] = replace(plans[name], chain=chain, online=obstacle is not None).noted(obstacle)
    if chain.transforms and obstacle is None and group.producer is not None:
        updates = tuple((update, chain.boundaries) for update in group.producer.updates(chain, channels))
        source = group.producer.source
        if isinstance(source, str):
            plans[source] = replace(plans[source], rows=plans[source].rows + updates)
        else:
            before = modulations[source].rows if source in modulations else ()
            modulations[source] = ModulationPlan(before + updates)


def _obstacle(group: LinearGroup, chain: Chain, config: DQConfig, plans: Mapping[str, LinearPlan]) -> str | None:
    """Why the chain cannot be carried upstream, or None."""
    producer = group.producer
    if not config.fold and producer is not None:
        return "transformed online: fold=False"
    if producer is None:
        return "transformed online: nothing upstream can carry it"
    source = producer.source
    if isinstance(source, str) and source not in plans:
        return f"transformed online: {source}, which would carry it, stays in full precision"
    left = [name for name in group.linears if name not in plans]
    if left:
        return f"transformed online: {left[0]} reads the same input and stays in full precision"
    if config.quantize_attention and isinstance(producer, ValueProjection):
        return "transformed online: rows of quantized attention probabilities do not sum to one"
    if not producer.can_carry(chain):
        return (
            f"transformed online: {source if isinstance(source, str) else source.argument} cannot carry such a change"
        )
    return None


def _use_statistics(
    group: LinearGroup,
    site: Site,
    timesteps: Tensor,
    method: Method,
    solution: Solution,
    plans: dict[str, LinearPlan],
) -> None:
    """Static input ranges and samples; linears of a group that agree on the scheme share one search."""
    chain = solution.chains.get(group.name, Chain())
    assert site.statistics is not None
    sample = InputSample(site.statistics.tokens, timesteps)
    found: dict[QuantScheme, InputRange] = {}
    for name in group.linears:
        if name not in plans:
            continue
        plans[name] = replace(plans[name], sample=sample)
        scheme = plans[name].scheme
        if scheme is None or scheme.dynamic:
            continue
        if scheme not in found:
            boundaries = method.range_boundaries(site, chain, timesteps)
            found[scheme] = static_range(
                site.statistics, timesteps, chain, scheme, plans[name].recipe.search, boundaries
            )
        plans[name] = replace(plans[name], input_range=found[scheme])


def _use_moments(group: LinearGroup, statistics: Statistics, plans: dict[str, LinearPlan]) -> None:
    """Those that calibration summed, over all steps; without them they are found when the linear's turn comes."""
    site = _statistics_of(group, statistics)
    if site.products is None or site.sums is None or site.counts is None:
        if not statistics.samples:
            raise ValueError(
                'rounding="gptq" needs sums of x x^T: calibrate with second_moments=True, or with samples=32 to find'
                " them block by block"
            )
        return
    moments = InputMoments(site.products, site.sums, site.counts, statistics.timesteps)
    for name in group.linears:
        if name in plans:
            plans[name] = replace(plans[name], moments=moments)


def _attention_scales(
    spec: ModelSpec, config: DQConfig, statistics: Statistics | None
) -> dict[str, dict[str, Tensor]]:
    """Attention module -> operand -> scale [1]."""
    if statistics is None:
        raise ValueError("quantize_attention=True needs statistics (query, key and value have static ranges)")
    if not spec.attention:
        raise ValueError(
            "quantize_attention=True: no spec of this architecture says where its self-attention is. Pass"
            " quantize_attention=False (preset='paper' of htg and ptq4dit sets it otherwise)"
        )
    scales: dict[str, dict[str, Tensor]] = {}
    for site in spec.attention:
        for operand, name in zip(attention.OPERANDS, site.operands, strict=True):
            if name not in statistics.sites:
                raise ValueError(f"the statistics know nothing of {name}; calibrate the model again")
            scheme = attention.scheme(operand, config.activation_bits)
            found = static_range(statistics.sites[name], statistics.timesteps, Chain(), scheme, config.recipe.search)
            scales.setdefault(site.module, {})[operand] = found.scale
    return scales
