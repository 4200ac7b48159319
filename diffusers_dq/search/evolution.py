# SPDX-License-Identifier: Apache-2.0
"""Evolutionary search (Q-DiT, Chen et al., CVPR 2025, Algorithm 1) over one choice for each of many genes.

Each generation is half children of two good parents, half mutants of one, those over the limit rejected. Defaults are
the released code's: population 50, the best 10 as parents, 10 generations, a gene mutates with probability 0.1.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from diffusers_dq.search.record import Record

Genes = tuple[int, ...]
_TRIES = 20  # at a candidate that is new and within the limit, for each one wanted


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """population: candidates a generation.   parents: the best so far that the next ones are made of (TopK).
    generations: after the first.   mutation: probability of each gene to be drawn anew.   seed: of all chance.
    """

    population: int = 50
    parents: int = 10
    generations: int = 10
    mutation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("population", 1), ("parents", 1), ("generations", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not 0 < self.mutation <= 1:
            raise ValueError(f"mutation must be a probability above 0, got {self.mutation!r}")


@dataclass(frozen=True)
class Limit:
    """cost: of a candidate, in any units.   most: that it may be.   unit: for messages.

    What is proven impossible is proven for costs in which genes do not interact, as all of costs.py are.
    """

    cost: Callable[[Genes], float]
    most: float
    unit: str = ""

    def allows(self, genes: Genes) -> bool:
        return self.cost(genes) <= self.most


@dataclass(frozen=True)
class Found:
    """best: of least fitness.   generations: the candidates that each evaluated, in order.   values: all of them."""

    best: Genes
    fitness: float
    generations: tuple[tuple[Genes, ...], ...]
    values: dict[Genes, float]


def evolve(
    options: Sequence[int],
    fitness: Callable[[Genes], float],
    limit: Limit,
    settings: Evolution,
    *,
    start: Sequence[Genes] = (),
    record: Record | None = None,
    progress: bool = False,
) -> Found:
    """Search for genes of least fitness within a limit.

    options: how many a gene has, >= 1; gene i is an index below options[i].   fitness: lower is better; a NaN counts
        as infinite. No candidate is evaluated twice.
    start: candidates of the first generation, as far as the limit allows them; the rest is random.
    record: where fitness values are kept. A search that reads the values of an interrupted one draws the same chances
        and so ends exactly where that would have ended.
    It ends early where no candidate is left. Random numbers are its own: no global state is read or changed.
    Raises ValueError where no candidate is within the limit, or one of `start` is no candidate.
    """
    search = _Search(options, limit, settings)
    for genes in start:
        if len(genes) != len(options) or not all(0 <= gene < n for gene, n in zip(genes, options, strict=True)):
            raise ValueError(f"start: {genes} is no candidate; genes are indices below {tuple(options)}")
    record = record or Record(None, {})
    values: dict[Genes, float] = {}
    generations: list[tuple[Genes, ...]] = []
    candidates = search.first(start)
    total = settings.population * (settings.generations + 1)
    with tqdm(total=total, desc="search", unit="candidate", disable=not progress) as bar:
        for _ in range(settings.generations + 1):
            for genes in candidates:
                values[genes] = _number(record.value(key_of(genes), functools.partial(fitness, genes)))
                bar.set_postfix(best=f"{min(values.values()):.4g}", refresh=False)
                bar.update(1)
            generations.append(tuple(candidates))
            parents = sorted(values, key=lambda genes: (values[genes], genes))[: settings.parents]
            candidates = search.next(parents, values)
            if not candidates:
                break
    best = min(values, key=lambda genes: (values[genes], genes))
    return Found(best, values[best], tuple(generations), values)


def key_of(genes: Genes) -> str:
    return " ".join(map(str, genes))


def _number(fitness: float) -> float:
    return math.inf if math.isnan(fitness) else fitness


class _Search:
    """Makes candidates; keeps the generator, so the order of calls is what a seed determines."""

    def __init__(self, options: Sequence[int], limit: Limit, settings: Evolution) -> None:
        if not options or min(options) < 1:
            raise ValueError(f"a search needs genes with at least one option each, got {tuple(options)}")
        self.options = tuple(options)
        self.limit = limit
        self.settings = settings
        self.random = np.random.default_rng(settings.seed)
        self.cheapest = self._cheapest()

    def _cheapest(self) -> Genes:
        """Each gene's cheapest option with the others fixed. Raises ValueError where even this is over the limit."""
        genes: Genes = (0,) * len(self.options)
        for i, n in enumerate(self.options):
            genes = min((_with(genes, i, option) for option in range(n)), key=self.limit.cost)
        least = self.limit.cost(genes)
        if not least <= self.limit.most:
            raise ValueError(
                f"no candidate is within the limit of {self.limit.most:,.6g} {self.limit.unit}: the least is"
                f" {least:,.6g}; raise the limit, or allow cheaper options"
            )
        return genes

    def first(self, start: Sequence[Genes]) -> list[Genes]:
        """Up to `population` candidates, those of `start` before random ones."""
        made: dict[Genes, None] = {tuple(genes): None for genes in start if self.limit.allows(tuple(genes))}
        self._fill(made, self.settings.population - len(made), self._random, {})
        if not made:
            raise ValueError(f"found no candidate within the limit of {self.limit.most:,.6g} {self.limit.unit}")
        return list(made)

    def next(self, parents: Sequence[Genes], known: Mapping[Genes, float]) -> list[Genes]:
        """Half by crossover, half by mutation, what these leave open by chance; none that is known already."""
        made: dict[Genes, None] = {}
        half = self.settings.population // 2
        self._fill(made, half, lambda: self._crossed(parents), known)
        self._fill(made, self.settings.population - half, lambda: self._mutated(parents), known)
        self._fill(made, self.settings.population - len(made), self._random, known)
        return list(made)

    def _fill(
        self, made: dict[Genes, None], wanted: int, make: Callable[[], Genes], known: Mapping[Genes, float]
    ) -> None:
        """Add up to `wanted` new candidates within the limit, as far as `_TRIES` tries for each find any."""
        end = len(made) + wanted
        for _ in range(_TRIES * max(wanted, 0)):
            if len(made) >= end:
                return
            genes = make()
            if genes not in known and self.limit.allows(genes):
                made[genes] = None

    def _crossed(self, parents: Sequence[Genes]) -> Genes:
        """Each gene of one of two parents, with even odds."""
        a, b = (parents[i] for i in self.random.integers(len(parents), size=2))
        picks = self.random.random(len(a)) < 0.5
        return tuple(x if pick else y for x, y, pick in zip(a, b, picks, strict=True))

    def _mutated(self, parents: Sequence[Genes]) -> Genes:
        parent = parents[int(self.random.integers(len(parents)))]
        changes = self.random.random(len(parent)) < self.settings.mutation
        drawn = self.random.integers(self.options)
        return tuple(int(new) if change else old for old, new, change in zip(parent, drawn, changes, strict=True))

    def _random(self) -> Genes:
        """Drawn evenly, then gene after gene in random order made cheapest until it is within the limit.

        With a hundred genes evenly drawn candidates all cost about the same, and where that is over the limit
        rejection alone would never end.
        """
        genes: Genes = tuple(int(gene) for gene in self.random.integers(self.options))
        for i in self.random.permutation(len(genes)):
            if self.limit.allows(genes):
                break
            genes = _with(genes, int(i), self.cheapest[i])
        return genes


def _with(genes: Genes, i: int, option: int) -> Genes:
    return (*genes[:i], option, *genes[i + 1 :])
