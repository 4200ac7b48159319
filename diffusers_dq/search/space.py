# SPDX-License-Identifier: Apache-2.0
"""What a search over a model's linears chooses from, and the search itself, whatever the choices are of.

Q-DiT evolves random candidates by FID alone. Here the first generation also holds the exact optimum of a simpler
problem, in which layers do not interact, and uniform choices; the evolution goes on from what is best of these.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from diffusers import DiffusionPipeline

from diffusers_dq.allocation import allocate
from diffusers_dq.calibration import calibrate
from diffusers_dq.checks import check_argument
from diffusers_dq.config import DQConfig
from diffusers_dq.costs import Choice, bitops
from diffusers_dq.denoise import Call, check_calls, denoiser
from diffusers_dq.search.evolution import Evolution, Genes, Limit, evolve
from diffusers_dq.search.fitness import Fitness, TrajectoryError
from diffusers_dq.search.limits import ROUNDED_UP, BitOpsOf, Budget, checked_budget, priced
from diffusers_dq.search.record import Record, described
from diffusers_dq.search.running import tokens_of, with_transformer
from diffusers_dq.search.sensitivity import from_statistics
from diffusers_dq.search.trial import Layer, Trial, layers_of
from diffusers_dq.statistics import Statistics


@dataclass(frozen=True)
class Space:
    """genes: names of the linears that are chosen for together.   options: the choices of each gene.
    layers: by name."""

    genes: tuple[tuple[str, ...], ...]
    options: tuple[tuple[Choice, ...], ...]
    layers: Mapping[str, Layer]

    @classmethod
    def of(cls, layers: Sequence[Layer], options: Callable[[Layer], Sequence[Choice]], by_site: bool) -> "Space":
        """A gene a linear, or a site; linears that the configuration's overrides name have one option, their own."""
        genes: dict[tuple[str, bool], list[Layer]] = {}
        for layer in layers:
            together = by_site and not layer.pinned
            genes.setdefault((layer.site if together else layer.name, together), []).append(layer)
        return cls(
            tuple(tuple(layer.name for layer in some) for some in genes.values()),
            tuple((some[0].own,) if some[0].pinned else tuple(options(some[0])) for some in genes.values()),
            {layer.name: layer for layer in layers},
        )

    @property
    def choices(self) -> dict[str, tuple[Choice, ...]]:
        pairs = zip(self.genes, self.options, strict=True)
        return {name: options for names, options in pairs for name in names}

    def limited_to(self, possible: Mapping[str, Sequence[Choice]]) -> "Space":
        """Without options that a linear's width does not allow.   possible: of each linear."""
        pairs = zip(self.genes, self.options, strict=True)
        options = (tuple(c for c in some if all(c in possible[name] for name in names)) for names, some in pairs)
        return replace(self, options=tuple(options))

    @property
    def described(self) -> dict[str, list[str]]:
        """First linear of each gene -> its options."""
        return {names[0]: list(map(str, some)) for names, some in zip(self.genes, self.options, strict=True)}

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers.values())

    def chosen(self, genes: Genes) -> dict[str, Choice]:
        triples = zip(self.genes, self.options, genes, strict=True)
        return {name: options[i] for names, options, i in triples for name in names}

    def nearest(self, wanted: Callable[[Choice], float]) -> Genes:
        """In each gene the option for which `wanted` is least."""
        return tuple(min(range(len(options)), key=lambda i: wanted(options[i])) for options in self.options)

    def genes_of(self, config: DQConfig) -> Genes:
        """Raises ValueError for a configuration outside the space."""
        found = []
        for names, options in zip(self.genes, self.options, strict=True):
            some = {_choice_of(config, name) for name in names}
            if len(some) > 1 or not some <= set(options):
                raise ValueError(
                    f"start: {names[0]} is {', '.join(map(str, some))} there, and the search knows"
                    f" {', '.join(map(str, options))}"
                )
            found.append(options.index(some.pop()))
        return tuple(found)

    def configured(self, config: DQConfig, genes: Genes) -> DQConfig:
        """The configuration with these choices as overrides, behind its own."""
        chosen = {name: c.override for name, c in self.chosen(genes).items() if not self.layers[name].pinned}
        return config.copy(overrides={**config.overrides, **chosen})


def _choice_of(config: DQConfig, name: str) -> Choice:
    bits = config.bits_of(name)
    return Choice(bits.weight, bits.activation, config.recipe_of(name).group_size)


def evolve_choices(
    pipe: DiffusionPipeline,
    config: DQConfig,
    calls: Sequence[Call],
    make_space: Callable[[Sequence[Layer]], Space],
    uniform: Callable[[Space], Sequence[Genes]],
    *,
    num_inference_steps: int,
    statistics: Statistics | None,
    limit: BitOpsOf | Budget | float,
    fitness: Literal["trajectory"] | Fitness,
    start: Sequence[DQConfig],
    evolution: Evolution,
    checkpoint: str | os.PathLike[str] | None,
    progress: bool,
    component: str | None,
) -> DQConfig:
    """The configuration whose overrides make the fittest candidate found; arguments as `dq.search_group_sizes` takes
    them.   uniform: candidates of the first generation besides the exact allocation and `start`."""
    check_calls(pipe, calls)
    check_argument("num_inference_steps", num_inference_steps, int)
    used_up = next((i for i, call in enumerate(calls) if "generator" in call), None)
    if used_up is not None:
        raise ValueError(f"calls[{used_up}] sets generator, which the first candidate would use up; pass seed instead")
    if fitness != "trajectory" and not callable(fitness):
        raise ValueError(f"fitness must be 'trajectory' or a function of a pipeline, got {fitness!r}")
    model = denoiser(pipe, component)
    if getattr(model, "is_quantized", False):
        raise ValueError("the pipeline is quantized already; a search starts from the full-precision pipeline")
    if statistics is None:
        statistics = _calibrated(pipe, config, calls, num_inference_steps, evolution.seed, progress, component)
    space = make_space(layers_of(model, config, statistics))
    trial = Trial(model, config, statistics, space.choices)
    space = space.limited_to(trial.choices)
    private = with_transformer(pipe, trial.model, component)
    costs, within = _limit(space, trial, private, calls, evolution.seed, limit, component)
    settings = {
        "model": type(model).__name__,
        "weights": described(statistics.fingerprint),
        "config": config.to_dict(),
        "statistics": statistics.identity,
        "calls": described(list(calls)),
        "num_inference_steps": num_inference_steps,
        "limit": described([limit]),
        "fitness": described([fitness]),
        "start": [other.to_dict() for other in start],
        "evolution": {name: getattr(evolution, name) for name in ("population", "parents", "mutation", "seed")},
    }
    record = Record(checkpoint, settings | {"choices": space.described})
    first = [space.genes_of(other) for other in start]
    first += _exact(space, trial, statistics, costs, within.most)
    first += uniform(space)
    measure = fitness
    if not callable(measure):
        measure = TrajectoryError(private, calls, num_inference_steps=num_inference_steps, seed=evolution.seed)

    def of_candidate(genes: Genes) -> float:
        with trial.using(space.chosen(genes)):
            return float(measure(private))

    options = [len(some) for some in space.options]
    found = evolve(options, of_candidate, within, evolution, start=first, record=record, progress=progress)
    return space.configured(config, found.best)


def _calibrated(
    pipe: DiffusionPipeline,
    config: DQConfig,
    calls: Sequence[Call],
    steps: int,
    seed: int,
    progress: bool,
    component: str | None,
) -> Statistics:
    private = with_transformer(pipe, denoiser(pipe, component), component)
    moments: dict[str, Any] = {"second_moments": config.recipe.rounding == "gptq", "samples": 0}
    return calibrate(
        private, calls, num_inference_steps=steps, seed=seed, progress=progress, component=component, **moments
    )


def _limit(
    space: Space,
    trial: Trial,
    pipe: DiffusionPipeline,
    calls: Sequence[Call],
    seed: int,
    limit: BitOpsOf | Budget | float,
    component: str | None,
) -> tuple[list[list[float]], Limit]:
    """(cost of each gene's options, the limit of their sum)."""
    if isinstance(limit, BitOpsOf):
        cost = _bitops(space, trial, tokens_of(pipe, list(space.layers), calls, seed, component))
        uniform = sum(cost(name, limit.choice(of.own, of.in_features)) for name, of in space.layers.items())
        most, unit = ROUNDED_UP * limit.factor * uniform, "BitOps a forward"
    else:
        cost, most, unit = priced(checked_budget(limit), trial.stored_bits, space.weights)
    pairs = zip(space.genes, space.options, strict=True)
    costs = [[sum(cost(name, choice) for name in names) for choice in options] for names, options in pairs]
    return costs, Limit(lambda genes: sum(row[i] for row, i in zip(costs, genes, strict=True)), most, unit)


def _bitops(space: Space, trial: Trial, tokens: Mapping[str, float]) -> Callable[[str, Choice], float]:
    """Of a linear with a choice, for the tokens it reads in a forward."""

    def cost(name: str, choice: Choice) -> float:
        layer, bits = space.layers[name], trial.bits(name, choice)
        shape = layer.out_features, layer.in_features, tokens[name]
        return bitops(*shape, bits.weight, bits.activation, choice.group_size)

    return cost


def _exact(
    space: Space, trial: Trial, statistics: Statistics, costs: Sequence[Sequence[float]], most: float
) -> list[Genes]:
    """The allocation of least total error of the linears' own outputs; none where the limit cannot be met."""
    if sum(map(min, costs)) > most:
        return []  # evolve says so
    table = from_statistics(trial, space.choices, statistics)
    pairs = zip(space.genes, space.options, strict=True)
    errors = [[sum(table[name][i] for name in names) for i in range(len(options))] for names, options in pairs]
    return [allocate(errors, costs, most)]
