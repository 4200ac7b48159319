# SPDX-License-Identifier: Apache-2.0
"""`dq.search_group_sizes`: a group size for each layer (Q-DiT's automatic granularity allocation)."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from diffusers import DiffusionPipeline

from diffusers_dq.config import DQConfig
from diffusers_dq.costs import Choice, legal_group_sizes
from diffusers_dq.denoise import Call
from diffusers_dq.search.evolution import Evolution, Genes
from diffusers_dq.search.fitness import Fitness
from diffusers_dq.search.limits import BitOpsOf, Budget
from diffusers_dq.search.space import Space, evolve_choices
from diffusers_dq.search.trial import Layer
from diffusers_dq.statistics import Statistics

SIZES = (32, 64, 96, 128, 192, 288)
OF_128 = BitOpsOf(128)


def search_group_sizes(
    pipe: DiffusionPipeline,
    config: DQConfig,
    calls: Sequence[Call],
    *,
    num_inference_steps: int,
    statistics: Statistics | None = None,
    limit: BitOpsOf | Budget | float = OF_128,
    fitness: Literal["trajectory"] | Fitness = "trajectory",
    sizes: Sequence[int] = SIZES,
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
    """A copy of the configuration whose overrides give each linear a group size, found by evolution (Algorithm 1).

    config: method and all else; linears that its overrides name keep what these say, and count. rounding="adaround"
        is searched as "nearest", which it starts from.
    calls, num_inference_steps, seed: the runs by which candidates are judged, as `dq.compare` takes them.
    statistics: of the same model; None calibrates with `calls` first.
    limit: BitOpsOf a uniform size; storage: mean bits a weight (a number, or MeanBits), StoredBytes, ShareOfBF16; or
        LayerCost, any cost of yours.
    fitness: "trajectory" is the mean squared error of final latents to full precision; else a function of a pipeline,
        lower is better: FeatureFID is the paper's.
    sizes: tried, where they divide a linear's width. Where none does, it has one scale a row. Linears that read the
        same input have the same size.
    start: configurations of the first generation, besides the exact allocation by output error and uniform sizes.
    population, parents, generations, mutation: see Evolution.
    checkpoint: a JSON file of every candidate's fitness; the same call again goes on from it, with more generations if
        asked, and finds what an uninterrupted one finds.
    component: "transformer" or "transformer_2" of a pipeline that has both (Wan 2.2).

    The pipeline is not changed: copies of its transformer and scheduler are. Memory: see Trial.
    Cost: population x (generations + 1) runs of all calls.
    Raises ValueError where nothing is within the limit, and as `dq.quantize` does.
    """

    def options(layer: Layer) -> list[Choice]:
        legal = legal_group_sizes(layer.in_features, sizes) or (0,)
        return [replace(layer.own, group_size=size) for size in legal]

    def make_space(layers: Sequence[Layer]) -> Space:
        space = Space.of(layers, options, by_site=True)
        if max(map(len, space.options)) < 2:
            widths = sorted({layer.in_features for layer in layers})
            raise ValueError(
                f"there is nothing to search: at most one of the sizes {tuple(sizes)} divides each of the widths"
                f" {widths}; sizes must be multiples of 32"
            )
        return space

    return evolve_choices(
        pipe,
        config,
        calls,
        make_space,
        _uniform,
        num_inference_steps=num_inference_steps,
        statistics=statistics,
        limit=limit,
        fitness=fitness,
        start=start,
        evolution=Evolution(
            population=population, parents=parents, generations=generations, mutation=mutation, seed=seed
        ),
        checkpoint=checkpoint,
        progress=progress,
        component=component,
    )


def _uniform(space: Space) -> list[Genes]:
    """Each size everywhere, or what is next below it, from the coarsest on."""
    sizes = sorted({choice.group_size for some in space.options for choice in some}, reverse=True)

    def distance(size: int, choice: Choice) -> float:
        above = choice.group_size > size
        return abs(choice.group_size - size) + (1 << 30 if above else 0)

    return [space.nearest(partial(distance, size)) for size in sizes]
