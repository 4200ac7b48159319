# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffusers_dq.allocation import Budget, allocate, allocate_by_group, cost_of, normalised

numbers = st.floats(0, 1e3, allow_nan=False)


@st.composite
def problems(draw):
    """(errors, costs) of up to 6 layers with up to 4 options each."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    errors = [draw(st.lists(numbers, min_size=n, max_size=n)) for n in lengths]
    costs = [draw(st.lists(st.integers(0, 10**9), min_size=n, max_size=n)) for n in lengths]
    return errors, costs


def brute_force(errors, costs, budgets):
    """The least total error of all combinations within the budgets; None where there is none."""
    combinations = itertools.product(*(range(len(row)) for row in errors))
    within = [c for c in combinations if all(cost_of(c, costs, b.layers) <= b.limit for b in budgets)]
    return min((cost_of(c, errors) for c in within), default=None)


@settings(deadline=None)
@given(problems(), st.floats(0, 1))
def test_one_budget_is_spent_as_well_as_any_combination_spends_it(problem, share):
    errors, costs = problem
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = least + int(share * (most - least))
    chosen = allocate(errors, costs, budget)
    assert cost_of(chosen, costs) <= budget
    best = brute_force(errors, costs, [Budget(tuple(range(len(errors))), budget)])
    assert cost_of(chosen, errors) <= best + 1e-9 * sum(map(max, errors))


@settings(deadline=None)
@given(problems(), st.floats(0, 1), st.floats(0, 1))
def test_so_are_budgets_of_parts(problem, first, second):
    errors, costs = problem
    assume(len(errors) > 1)
    parts = [tuple(range(0, len(errors), 2)), tuple(range(1, len(errors), 2))]
    budgets = []
    for layers, share in zip(parts, (first, second), strict=True):
        least, most = (sum(f(costs[i]) for i in layers) for f in (min, max))
        budgets.append(Budget(layers, least + int(share * (most - least))))
    chosen = allocate(errors, costs, budgets)
    assert all(cost_of(chosen, costs, b.layers) <= b.limit for b in budgets)
    assert cost_of(chosen, errors) <= brute_force(errors, costs, budgets) + 1e-9 * sum(map(max, errors))


@settings(deadline=None)
@given(problems(), st.floats(0, 1))
def test_decoupled_spends_each_groups_share_by_its_own_metric(problem, share):
    errors, costs = problem
    output = [row[::-1] for row in errors]
    groups = ["text" if i % 2 else "looks" for i in range(len(errors))]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = least + int(share * (most - least))
    chosen = allocate_by_group(errors, output, costs, groups, budget, "decoupled")
    first = allocate(output, costs, budget)
    shares = [
        Budget(layers, cost_of(first, costs, layers))
        for layers in (tuple(i for i, g in enumerate(groups) if g == name) for name in ("looks", "text"))
    ]
    assert cost_of(chosen, costs) <= budget
    assert all(cost_of(chosen, costs, part.layers) <= part.limit for part in shares)
    units = normalised(errors, groups)
    assert cost_of(chosen, units) <= brute_force(units, costs, shares) + 1e-9 * sum(map(max, units))


def test_joint_counts_metrics_of_any_units_alike():
    errors, costs = [[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]], [[0, 1]] * 3
    groups = ["a", "b", "b"]
    scaled = [errors[0], *([1e6 * value for value in row] for row in errors[1:])]
    for rows in (errors, scaled):
        assert allocate_by_group(rows, rows, costs, groups, 2, "joint") == (1, 1, 0)


def test_a_budget_below_the_least_names_the_least():
    with pytest.raises(ValueError, match="the cheapest options take 30"):
        allocate([[1.0, 0.0]] * 3, [[10, 20]] * 3, 29)
    with pytest.raises(ValueError, match="text of 5 cannot be met"):
        allocate([[1.0, 0.0]] * 3, [[10, 20]] * 3, [Budget((0,), 5, "text")])


@pytest.mark.parametrize(
    ("errors", "costs", "message"),
    [([[1.0]], [[1, 2]], "a row a layer"), ([[]], [[]], "a row a layer"), ([[float("nan")]], [[1]], "not finite")],
)
def test_rows_that_do_not_fit_are_refused(errors, costs, message):
    with pytest.raises(ValueError, match=message):
        allocate(errors, costs, 10)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'joint' or 'decoupled'"):
        allocate_by_group([[1.0]], [[1.0]], [[1]], ["a"], 1, "greedy")
