# SPDX-License-Identifier: Apache-2.0
"""Denoising steps cut into contiguous groups, and the group of the step that runs now.

Groups are keyed by the *value* of the timestep, in the model's own units, never by a loop index: what was calibrated
over 100 steps serves 20 steps of another scheduler. Notation: S steps, G groups, P partitions, K channels.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Linkage = Literal["optimal", "ward", "average", "centroid"]
Boundaries = tuple[float, ...]


def partition(z: Tensor, groups: int, linkage: Linkage = "optimal") -> list[int]:
    """Cut a sequence of vectors into contiguous groups of similar ones (HTG, Eq. 3 with squared distances).

    z: [S, K], neighbours in time are neighbours in S.   groups: 1 <= G <= S.
    "optimal" is the exact minimum of the sum of squared distances to the group means, by dynamic programming; the
    others are HTG's Algorithm 1, which merges the closest pair of adjacent groups until G are left.
    Returns the first index of each group but the first: G - 1 increasing integers in 1 .. S - 1.
    """
    steps = len(z)
    if not 1 <= groups <= steps:
        raise ValueError(f"groups must be between 1 and the number of calibrated steps, {steps}; got {groups}")
    if linkage == "optimal":
        return _optimal_cuts(z.double(), groups)
    if linkage not in _LINKAGES:
        raise ValueError(f"unknown linkage {linkage!r}; known: optimal, {', '.join(sorted(_LINKAGES))}")
    return _agglomerative_cuts(z.double(), groups, _LINKAGES[linkage])


def partition_cost(z: Tensor, cuts: Sequence[int]) -> float:
    """Sum over groups of the squared distances to the group's mean."""
    return sum(float((part - part.mean(0)).square().sum()) for part in torch.tensor_split(z.double(), list(cuts)))


def _optimal_cuts(z: Tensor, groups: int) -> list[int]:
    """Fisher-Jenks: best[g][j] = min_i best[g - 1][i] + cost(i, j), cost(i, j) = sum |z|^2 - |sum z|^2 / (j - i)."""
    steps = len(z)
    z = z - z.mean(0)  # the cost is a difference of two sums: keep them small
    sums = torch.cat([torch.zeros_like(z[:1]), z.cumsum(0)])  # [S + 1, K]
    squares = torch.cat([z.new_zeros(1), z.square().sum(1).cumsum(0)])  # [S + 1]
    count = torch.arange(steps + 1)[None, :] - torch.arange(steps + 1)[:, None]
    within = torch.cdist(sums, sums, compute_mode="donot_use_mm_for_euclid_dist").square() / count.clamp(min=1)
    cost = (squares[None, :] - squares[:, None] - within).clamp(min=0).masked_fill(count <= 0, torch.inf)

    best, origins = cost[0], []
    for _ in range(groups - 1):
        best, origin = (best[:, None] + cost).min(dim=0)
        origins.append(origin)
    cuts, end = [], steps
    for origin in reversed(origins):
        end = int(origin[end])
        cuts.append(end)
    return cuts[::-1]


def _ward(a: Tensor, b: Tensor) -> float:
    """Increase of the within-group sum of squares by the merge."""
    return len(a) * len(b) / (len(a) + len(b)) * float((a.mean(0) - b.mean(0)).square().sum())


def _average(a: Tensor, b: Tensor) -> float:
    return float(torch.cdist(a, b).mean())


def _centroid(a: Tensor, b: Tensor) -> float:
    return float((a.mean(0) - b.mean(0)).norm())


_LINKAGES: dict[str, Callable[[Tensor, Tensor], float]] = {"ward": _ward, "average": _average, "centroid": _centroid}


def _agglomerative_cuts(z: Tensor, groups: int, distance: Callable[[Tensor, Tensor], float]) -> list[int]:
    """HTG, Algorithm 1: only adjacent groups may merge."""
    parts = list(z.split(1))
    gaps = [distance(a, b) for a, b in zip(parts, parts[1:], strict=False)]
    while len(parts) > groups:
        i = min(range(len(gaps)), key=gaps.__getitem__)
        parts[i : i + 2] = [torch.cat(parts[i : i + 2])]
        del gaps[i]
        for j in (i - 1, i):
            if 0 <= j < len(gaps):
                gaps[j] = distance(parts[j], parts[j + 1])
    return torch.tensor([len(part) for part in parts[:-1]], dtype=torch.long).cumsum(0).tolist()


def boundaries_of(timesteps: Tensor, cuts: Sequence[int]) -> Boundaries:
    """Thresholds halfway between the neighbours that a cut separates.   timesteps: [S], ascending."""
    return tuple((float(timesteps[i - 1]) + float(timesteps[i])) / 2 for i in cuts)


def group_of(timesteps: Tensor, boundaries: Boundaries) -> Tensor:
    """Group index int64, of timesteps' shape: the number of boundaries below. Values outside get the nearest group."""
    edges = torch.tensor(boundaries, dtype=torch.float32, device=timesteps.device)
    return torch.bucketize(timesteps.float(), edges)


def refine(*partitions: Boundaries) -> Boundaries:
    """The common refinement: a step is in one group of it exactly if it is in one group of each partition."""
    return tuple(sorted(set().union(*partitions)))


def expand(table: Tensor, boundaries: Boundaries, finer: Boundaries) -> Tensor:
    """The rows of a table [G, ...] repeated for the groups of a refinement of its partition; one row stays one."""
    if len(table) == 1 or boundaries == finer:
        return table
    probes = torch.tensor([*finer, torch.inf], dtype=torch.float32)  # the upper end of each finer group
    return table[group_of(probes, boundaries)]


class TimestepGroups(nn.Module):
    """The group of the current step, a device tensor [P] int64 that quantized layers read; one entry a partition.

    kept: [P, E], the model's boundaries once more, in no file, for when accelerate has offloaded the model's own: it
    brings those back after forward pre-hooks have run.
    `select` writes it in place from the model's timestep argument: no host synchronisation, no Python number, so one
    compiled graph or CUDA graph serves all steps. A model forward pre-hook calls it.
    activation_bits: of this step, where they change with it (step_policy.py): a Python number, so that torch.compile
    makes a graph for each.
    """

    index: Tensor
    kept: Tensor
    activation_bits: int | None = None

    def __init__(self, partitions: int = 1) -> None:
        super().__init__()
        self.register_buffer("index", torch.zeros(partitions, dtype=torch.long), persistent=False)
        self.register_buffer("kept", torch.empty(partitions, 0), persistent=False)

    def select(self, boundaries: Tensor, timestep: Tensor, descending: bool = True) -> None:
        """boundaries: [P, E] fp32 ascending, padded with inf.   timestep: of any shape; the noisiest entry decides,
        the largest where noise falls with the timestep (`descending`), else the smallest."""
        value = timestep.float().amax() if descending else timestep.float().amin()
        value = value.to(self.index.device).expand(len(boundaries), 1).contiguous()
        self.index.copy_(torch.searchsorted(boundaries.to(self.index.device), value).squeeze(1))


def boundary_table(partitions: Sequence[Boundaries]) -> Tensor:
    """[P, E] fp32, each row a partition, padded with inf: a boundary that no timestep passes."""
    width = max((len(p) for p in partitions), default=0)
    rows = [[*p, *[torch.inf] * (width - len(p))] for p in partitions]
    return torch.tensor(rows, dtype=torch.float32).reshape(len(partitions), width)
