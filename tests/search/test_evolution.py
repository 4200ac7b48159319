# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dq.search.evolution import Evolution, Limit, evolve
from diffusers_dq.search.record import Record

OPTIONS = (4, 3, 1, 5, 2, 4)
SMALL = Evolution(population=8, parents=3, generations=5, seed=3)


def fitness(genes):
    """Rugged: genes interact."""
    return math.sin(sum((i + 1) * (gene + 1) ** 2 for i, gene in enumerate(genes))) + 0.1 * sum(genes)


def cost(genes):
    return sum((i + 1) * gene for i, gene in enumerate(genes))


NO_LIMIT = Limit(cost, math.inf)


def test_a_seed_gives_the_same_search_whatever_the_global_state():
    first = evolve(OPTIONS, fitness, NO_LIMIT, SMALL)
    random.seed(99)
    np.random.seed(99)
    state = np.random.get_state()[1].copy()
    assert evolve(OPTIONS, fitness, NO_LIMIT, SMALL) == first
    assert (np.random.get_state()[1] == state).all()
    other = Evolution(population=8, parents=3, generations=5, seed=4)
    assert evolve(OPTIONS, fitness, NO_LIMIT, other).generations != first.generations


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.floats(0, 1), st.integers(0, 100))
def test_every_candidate_of_every_generation_is_within_the_limit_and_new(options, share, seed):
    most = share * cost([n - 1 for n in options])
    found = evolve(options, fitness, Limit(cost, most), Evolution(population=6, parents=2, generations=3, seed=seed))
    candidates = [genes for generation in found.generations for genes in generation]
    assert all(cost(genes) <= most for genes in candidates)
    assert all(0 <= gene < n for genes in candidates for gene, n in zip(genes, options, strict=True))
    assert len(set(candidates)) == len(candidates) <= 6 * 4
    assert found.fitness == min(map(fitness, candidates)) == fitness(found.best)


def test_a_generation_is_full_though_hardly_any_evenly_drawn_candidate_is_within_the_limit():
    options = (6,) * 100  # drawn evenly they cost 12625 on average, with a deviation of 993
    found = evolve(options, fitness, Limit(cost, 500), Evolution(population=20, generations=2))
    assert [len(generation) for generation in found.generations] == [20, 20, 20]


def test_a_small_space_is_searched_to_its_end():
    options = (2, 3, 2)
    everything = set(itertools.product(*map(range, options)))
    found = evolve(options, fitness, NO_LIMIT, Evolution(population=6, parents=6, generations=50, mutation=0.5))
    assert found.best == min(everything, key=fitness)
    assert set(found.values) == everything and len(found.generations) < 51


def test_children_take_each_gene_from_a_parent():
    start = [(0,) * 40, (1,) * 40]  # where nothing mutates, only crossover makes ones
    found = evolve((3,) * 40, lambda genes: 2 in genes, NO_LIMIT, Evolution(population=4, parents=2), start=start)
    children = found.generations[1][:2]
    assert all(set(child) == {0, 1} for child in children)


def test_no_candidate_is_evaluated_twice():
    calls = []
    evolve(OPTIONS, lambda genes: calls.append(genes) or fitness(genes), NO_LIMIT, SMALL)
    assert len(calls) == len(set(calls))


def test_start_is_the_first_generation_as_far_as_the_limit_allows():
    cheap, dear = (0,) * 6, (3, 2, 0, 4, 1, 3)
    first = evolve(OPTIONS, fitness, Limit(cost, 10), SMALL, start=[dear, cheap]).generations[0]
    assert first[0] == cheap and dear not in first and len(first) == 8


@pytest.mark.parametrize("after", [0, 1, 7, 20, 39])
def test_a_resumed_search_ends_where_an_uninterrupted_one_does(tmp_path, after):
    whole = evolve(OPTIONS, fitness, Limit(cost, 30), SMALL)
    path, left = tmp_path / "search.json", [after]

    def interrupted(genes):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return fitness(genes)

    with pytest.raises(KeyboardInterrupt):
        evolve(OPTIONS, interrupted, Limit(cost, 30), SMALL, record=Record(path, {"seed": 3}))
    assert after == 0 or len(json.loads(path.read_text())["values"]) == after
    evaluated = []
    resumed = evolve(
        OPTIONS,
        lambda genes: evaluated.append(genes) or fitness(genes),
        Limit(cost, 30),
        SMALL,
        record=Record(path, {"seed": 3}),
    )
    assert resumed == whole
    assert len(evaluated) == len(whole.values) - after


def test_a_nan_is_never_the_best():
    found = evolve((2, 2), lambda genes: math.nan if genes == (0, 0) else sum(genes), NO_LIMIT, SMALL)
    assert found.fitness == 1


def test_an_impossible_limit_names_the_least():
    with pytest.raises(ValueError, match="no candidate is within the limit of 2 bits: the least is 3"):
        evolve((2, 2), fitness, Limit(lambda genes: 3 + sum(genes), 2, "bits"), SMALL)


@pytest.mark.parametrize("start", [(0, 0), (0, 0, 2)])
def test_a_start_of_another_space_is_refused(start):
    with pytest.raises(ValueError, match="is no candidate"):
        evolve((2, 2, 2), fitness, NO_LIMIT, SMALL, start=[start])


@pytest.mark.parametrize("wrong", [dict(population=0), dict(parents=0), dict(generations=-1), dict(mutation=0.0)])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Evolution(**wrong)
