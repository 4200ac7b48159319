# SPDX-License-Identifier: Apache-2.0
"""One option for each layer, of least total error within budgets: an integer programme, solved exactly.

    minimise    sum_l sum_o  error[l, o] u[l, o]          u[l, o] in {0, 1},  sum_o u[l, o] = 1 for each layer l
    subject to  sum_{l in m} sum_o cost[l, o] u[l, o] <= budget_m          for each budget m

ViDiT-Q's mixed precision (Zhao et al., ICLR 2025) and the "ILP" row of Q-DiT's comparison are of this form.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Mode = Literal["joint", "decoupled"]

_ERROR_RANGE = 1e4  # of errors as the solver sees them: its absolute tolerances (1e-6) then are 1e-10 of the total
_TOLERANCE = 1e-6  # of the solver, in units of the dearest option: by so much it may overdraw a budget
_MOST_CUTS = 50  # combinations that are forbidden one by one for that, before budgets are tightened

Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Budget:
    """layers: indices of those that share it.   limit: of the sum of their costs.   name: for messages."""

    layers: tuple[int, ...]
    limit: float
    name: str = "the budget"


def allocate(errors: Rows, costs: Rows, budget: float | Sequence[Budget]) -> tuple[int, ...]:
    """The option of each layer, an index into its row, of least total error within the budgets.

    errors, costs: a row a layer, an entry an option, of any finite values; rows may differ in length, errors and costs
    of a layer may not.   budget: of all layers, or several of parts of them.
    Raises ValueError for a budget that even the cheapest options exceed, with the least possible.
    """
    _check(errors, costs)
    layers = tuple(range(len(errors)))
    budgets = [Budget(layers, float(budget))] if isinstance(budget, (int, float)) else list(budget)
    for part in budgets:
        least = sum(min(costs[i]) for i in part.layers)
        if least > part.limit:
            raise ValueError(
                f"{part.name} of {part.limit:,.6g} cannot be met: the cheapest options take {least:,.6g}; raise it,"
                " or allow cheaper options"
            )
    if not layers:
        return ()
    cuts: list[tuple[int, ...]] = []
    slack = 0.0
    while True:
        chosen = _solve(errors, costs, budgets, cuts, slack)
        if all(cost_of(chosen, costs, part.layers) <= part.limit for part in budgets):
            return chosen
        cuts.append(chosen)
        if len(cuts) > _MOST_CUTS:
            slack = max(2 * slack, _TOLERANCE)


def cost_of(chosen: Sequence[int], costs: Rows, layers: Sequence[int] | None = None) -> float:
    return sum(costs[i][chosen[i]] for i in (range(len(chosen)) if layers is None else layers))


def allocate_by_group(
    errors: Rows, output_errors: Rows, costs: Rows, groups: Sequence[Hashable], budget: float, mode: Mode
) -> tuple[int, ...]:
    """ViDiT-Q's metric-decoupled mixed precision: each layer's error is counted by the metric of its own group.

    errors: by the metric of a layer's group, in that metric's units.   output_errors: of the model's output, for all
    layers alike.   groups: of each layer.
    "decoupled" is the paper's: (i) the budget is divided over the groups as the least output error divides it, (ii)
    each group's share is spent by its own metric. "joint" is one programme over all layers, each metric divided by
    its group's mean worst error, which spends one budget where it helps any metric most.
    Raises ValueError as `allocate`, and for an unknown mode.
    """
    if mode == "joint":
        return allocate(normalised(errors, groups), costs, budget)
    if mode != "decoupled":
        raise ValueError(f"mode must be 'joint' or 'decoupled', got {mode!r}")
    first = allocate(output_errors, costs, budget)
    members = {group: tuple(i for i, of in enumerate(groups) if of == group) for group in dict.fromkeys(groups)}
    shares = [Budget(layers, cost_of(first, costs, layers), str(group)) for group, layers in members.items()]
    return allocate(normalised(errors, groups), costs, shares)


def normalised(errors: Rows, groups: Sequence[Hashable]) -> list[list[float]]:
    """Errors in units of their group's mean worst one, so that metrics of different units add up."""
    worst: dict[Hashable, list[float]] = {}
    for row, group in zip(errors, groups, strict=True):
        worst.setdefault(group, []).append(max(abs(value) for value in row))
    units: Mapping[Hashable, float] = {group: float(np.mean(values)) or 1.0 for group, values in worst.items()}
    return [[value / units[group] for value in row] for row, group in zip(errors, groups, strict=True)]


def _check(errors: Rows, costs: Rows) -> None:
    if len(errors) != len(costs) or any(len(a) != len(b) or not a for a, b in zip(errors, costs, strict=False)):
        raise ValueError("errors and costs need a row a layer with an entry for each of its options, at least one")
    for name, rows in (("errors", errors), ("costs", costs)):
        bad = next((i for i, row in enumerate(rows) if not np.isfinite(row).all()), None)
        if bad is not None:
            raise ValueError(f"{name} of layer {bad} are not finite: {list(rows[bad])}")


def _solve(
    errors: Rows, costs: Rows, budgets: Sequence[Budget], cuts: Sequence[tuple[int, ...]], slack: float
) -> tuple[int, ...]:
    """In units of the solver: errors and costs above each layer's least, which changes no choice.

    cuts: combinations that are over a budget by less than the solver's tolerance: none of them again.
    slack: share of the dearest option that is kept back from each budget besides.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes longer to import than this package
    from scipy.sparse import csr_array

    starts = np.cumsum([0, *map(len, errors)])
    gains = np.concatenate([np.asarray(row, float) - min(row) for row in errors])
    gains *= _ERROR_RANGE / (gains.max() or 1.0)
    possible = np.ones(len(gains))
    constraints = [_one_each(starts)]
    for budget in budgets:
        row = np.zeros(len(gains))
        for i in budget.layers:
            row[starts[i] : starts[i + 1]] = np.asarray(costs[i], float) - min(costs[i])
        unit = row.max() or 1.0
        room = max(budget.limit - sum(min(costs[i]) for i in budget.layers) - slack * unit, 0.0)
        possible[row > room] = 0
        constraints.append(LinearConstraint(csr_array(row[None] / unit), ub=room / unit))
    for cut in cuts:
        row = np.zeros(len(gains))
        row[starts[:-1] + np.asarray(cut)] = 1
        constraints.append(LinearConstraint(csr_array(row[None]), ub=len(cut) - 1))
    result = milp(
        gains,
        integrality=np.ones(len(gains)),
        bounds=Bounds(0, possible),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RuntimeError(f"the integer programme was not solved: {result.message}")
    return tuple(int(np.argmax(result.x[a:b])) for a, b in zip(starts[:-1], starts[1:], strict=True))


def _one_each(starts: np.ndarray) -> Any:
    """The constraint that each layer has one option."""
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

    total, layers = int(starts[-1]), len(starts) - 1
    of_layer = np.repeat(np.arange(layers), np.diff(starts))
    matrix = csr_array((np.ones(total), (of_layer, np.arange(total))), shape=(layers, total))
    return LinearConstraint(matrix, lb=1, ub=1)
