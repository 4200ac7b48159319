# SPDX-License-Identifier: Apache-2.0
"""Mixed precision under a budget of storage: `dq.allocate_bits` by an integer programme (ViDiT-Q), and
`dq.search_bits`, which goes on from there by measuring whole configurations.

A programme adds up what each linear does alone. Of errors of final latents on examples/dit-cifar10 such sums are 8
percent too small with 4 bits everywhere, twice too large with 6: where the programme's optimum is close to a uniform
configuration, only measuring tells which is better.
"""

import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

from diffusers import DiffusionPipeline
from torch import nn

from diffusers_dq.allocation import Mode, allocate, allocate_by_group
from diffusers_dq.config import DQConfig
from diffusers_dq.costs import Choice
from diffusers_dq.denoise import Call, denoiser
from diffusers_dq.layout import NOT_ROUNDED
from diffusers_dq.search.evolution import Evolution
from diffusers_dq.search.fitness import Fitness
from diffusers_dq.search.limits import Budget, LayerCost, checked_budget, priced
from diffusers_dq.search.metrics import LayerMetric
from diffusers_dq.search.record import Record, described
from diffusers_dq.search.sensitivity import from_outputs, from_statistics
from diffusers_dq.search.space import Space, evolve_choices
from diffusers_dq.search.trial import Layer, Trial, layers_of
from diffusers_dq.statistics import Statistics

Metrics = Literal["outputs", "layers"] | Sequence[LayerMetric]


def allocate_bits(
    pipe_or_transformer: Any,
    config: DQConfig,
    statistics: Statistics,
    *,
    budget: Budget | float,
    bits: Sequence[int | tuple[int, int]] = (4, 8),
    metrics: Metrics = "outputs",
    mode: Mode = "joint",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    component: str | None = None,
) -> DQConfig:
    """A copy of the configuration whose overrides give each linear the bits that serve best within the budget.

    config: method and all else; linears that its overrides name keep what these say, and count.
    statistics: from `dq.calibrate`, with samples unless metrics="layers".
    budget: of all weights that are converted: mean bits a weight (a number, or MeanBits), StoredBytes or ShareOfBF16;
        scales and zero points count. Or LayerCost: a latency measured a linear, say.
    bits: what a weight may take, each with the configuration's bits of the input, or pairs of both (weight, input).
    metrics: "outputs" ranks layers by ViDiT-Q's groups in latent form (metrics.default_metrics); "layers" by the
        relative error of their own output, from the statistics alone, in seconds; or a list of LayerMetric.
    mode: see allocation.allocate_by_group.
    checkpoint: a JSON file of the sensitivities found so far; the same call again goes on from it.
    component: "transformer" or "transformer_2" of a pipeline that has both (Wan 2.2).

    The model is not changed: a copy is. Cost: one forward a sample for each linear and each of its bits.
    Raises ValueError for a budget that cannot be met, with the least that can, and as `dq.quantize` does.
    """
    model = denoiser(pipe_or_transformer, component)
    budget = checked_budget(budget)
    if isinstance(metrics, str) and metrics not in ("outputs", "layers"):
        raise ValueError(f"metrics must be 'outputs', 'layers' or a list of LayerMetric, got {metrics!r}")
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be 'joint' or 'decoupled', got {mode!r}")
    if metrics == "layers" and mode != "joint":
        raise ValueError("metrics='layers' has one metric for all layers, which nothing can decouple: mode='joint'")
    if getattr(model, "is_quantized", False):
        raise ValueError("the model is quantized already; bits are chosen from the full-precision model")
    layers = layers_of(model, config, statistics)
    trial = Trial(model, config, statistics, _choices(layers, bits), keep=False)
    cost, most, unit = priced(budget, trial.stored_bits, sum(layer.weights for layer in layers))
    costs = [[cost(name, choice) for choice in some] for name, some in trial.choices.items()]
    _check_possible(budget, most, unit, costs, layers)
    record = Record(checkpoint, _settings(model, config, statistics, trial.choices, metrics))
    if metrics == "layers":
        table = from_statistics(trial, trial.choices, statistics, record, progress)
        chosen = allocate(list(table.values()), costs, most)
    else:
        pipe = pipe_or_transformer if isinstance(pipe_or_transformer, DiffusionPipeline) else None
        given = None if metrics == "outputs" else metrics
        of = from_outputs(
            trial,
            trial.choices,
            statistics,
            given,
            pipe=pipe,
            record=record,
            progress=progress,
            component=component,
        )
        rows = list(of.own.values()), list(of.output.values())
        chosen = allocate_by_group(*rows, costs, list(of.groups.values()), most, mode)
    picked = zip(layers, trial.choices.values(), chosen, strict=True)
    found = {layer.name: some[i].override for layer, some, i in picked if not layer.pinned}
    return config.copy(overrides={**config.overrides, **found})


def search_bits(
    pipe: DiffusionPipeline,
    config: DQConfig,
    calls: Sequence[Call],
    *,
    num_inference_steps: int,
    budget: Budget | float,
    bits: Sequence[int | tuple[int, int]] = (4, 8),
    statistics: Statistics | None = None,
    fitness: Literal["trajectory"] | Fitness = "trajectory",
    start: Sequence[DQConfig] = (),
    population: int = 50,
    parents: int = 10,
    generations: int = 10,
    mutation: float = 0.1,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    component: str | None = None,
) -> DQConfig:
    """A copy of the configuration whose overrides give each linear its bits, found by evolution.

    budget, bits: as for `allocate_bits`.   start: configurations of the first generation; what `allocate_bits` gave
    belongs here. Uniform bits and the exact allocation by the linears' own errors are in it anyway.
    All else as for `dq.search_group_sizes`.
    """
    if not bits:
        raise ValueError("bits is empty; give at least one number of weight bits, as (4, 8)")
    return evolve_choices(
        pipe,
        config,
        calls,
        lambda layers: Space.of(layers, lambda layer: [_choice(layer, b) for b in bits], by_site=False),
        lambda space: [tuple(min(i, len(some) - 1) for some in space.options) for i in range(len(bits))],
        num_inference_steps=num_inference_steps,
        statistics=statistics,
        limit=checked_budget(budget),
        fitness=fitness,
        start=start,
        evolution=Evolution(
            population=population, parents=parents, generations=generations, mutation=mutation, seed=seed
        ),
        checkpoint=checkpoint,
        progress=progress,
        component=component,
    )


def _choices(layers: Sequence[Layer], bits: Sequence[int | tuple[int, int]]) -> dict[str, list[Choice]]:
    """Raises ValueError for bits that no layer can have."""
    if not bits:
        raise ValueError("bits is empty; give at least one number of weight bits, as (4, 8)")
    return {layer.name: [layer.own] if layer.pinned else [_choice(layer, b) for b in bits] for layer in layers}


def _choice(layer: Layer, bits: int | tuple[int, int]) -> Choice:
    weight, activation = bits if isinstance(bits, tuple) else (bits, layer.own.activation_bits)
    if weight == NOT_ROUNDED and not isinstance(bits, tuple):
        activation = NOT_ROUNDED
    return Choice(weight, activation, layer.own.group_size)


def _check_possible(
    budget: Budget, most: float, unit: str, costs: Sequence[Sequence[float]], layers: Sequence[Layer]
) -> None:
    least = sum(map(min, costs))
    if least <= most:
        return
    weights = sum(layer.weights for layer in layers)
    amount = f"the weights take {least / 8:,.0f} bytes, {least / weights:.4g} bits each, {least / weights / 16:.4g} of"
    amount = f"the cost is {least:,.6g} {unit}" if isinstance(budget, LayerCost) else f"{amount} bf16"
    raise ValueError(
        f"{budget} cannot be met: with the fewest bits everywhere {amount}; raise the budget, or allow fewer bits"
    )


def _settings(
    model: nn.Module, config: DQConfig, statistics: Statistics, choices: dict[str, list[Choice]], metrics: Metrics
) -> dict[str, Any]:
    """All that a sensitivity depends on; not the budget, which a table serves any number of."""
    named = metrics if isinstance(metrics, str) else [[metric.name, *metric.layers] for metric in metrics]
    return {
        "search": "bits",
        "model": type(model).__name__,
        "weights": described(statistics.fingerprint),
        "config": config.to_dict(),
        "statistics": statistics.identity,
        "samples": described(list(statistics.samples)),
        "choices": {name: [str(choice) for choice in some] for name, some in choices.items()},
        "metrics": named,
    }
