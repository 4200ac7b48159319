# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dq import timesteps
from diffusers_dq.timesteps import TimestepGroups, boundaries_of, boundary_table, expand, group_of, partition, refine

LINKAGES = ("optimal", "ward", "average", "centroid")


def drifting(steps: int, channels: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(steps, channels, generator=torch.Generator().manual_seed(seed)).cumsum(0)


@given(steps=st.integers(1, 9), groups=st.integers(1, 9), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_dynamic_programming_finds_the_least_cost_of_all_partitions(steps, groups, seed):
    groups = min(groups, steps)
    z = drifting(steps, 3, seed)
    best = min(timesteps.partition_cost(z, cuts) for cuts in itertools.combinations(range(1, steps), groups - 1))
    cuts = partition(z, groups)
    # prefix sums of up to 9 fp64 values against direct sums
    assert timesteps.partition_cost(z, cuts) <= best + 1e-9 * (1 + best)


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("groups", [1, 2, 5, 39, 40])
def test_groups_are_contiguous_and_as_many_as_asked(linkage, groups):
    cuts = partition(drifting(40), groups, linkage)
    assert len(cuts) == groups - 1
    assert cuts == sorted(set(cuts))
    assert all(0 < cut < 40 for cut in cuts)


@pytest.mark.parametrize("linkage", LINKAGES[1:])
def test_optimal_costs_no_more_than_the_papers_clustering(linkage):
    z = drifting(100, 64)
    for groups in (2, 4, 10, 25):
        optimal = timesteps.partition_cost(z, partition(z, groups))
        assert optimal <= timesteps.partition_cost(z, partition(z, groups, linkage)) * (1 + 1e-12)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_plain_clusters_are_found(linkage):
    z = torch.cat([torch.zeros(7, 4), torch.full((3, 4), 5.0), torch.full((10, 4), -2.0)])
    z += 0.01 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    assert partition(z, 3, linkage) == [7, 10]


def test_impossible_partitions_say_what_is_possible():
    with pytest.raises(ValueError, match="between 1 and the number of calibrated steps, 5; got 6"):
        partition(drifting(5), 6)
    with pytest.raises(ValueError, match="known: optimal, average, centroid, ward"):
        partition(drifting(5), 2, "single")


def test_each_calibrated_step_is_in_its_own_group_and_others_in_the_nearest():
    steps = torch.tensor([1.0, 21, 41, 61, 81])
    boundaries = boundaries_of(steps, [2, 4])
    assert boundaries == (31.0, 71.0)
    assert group_of(steps, boundaries).tolist() == [0, 0, 1, 1, 2]
    assert group_of(torch.tensor([-5.0, 30, 32, 999]), boundaries).tolist() == [0, 0, 1, 2]


@given(
    first=st.sets(st.integers(0, 20), max_size=4),
    second=st.sets(st.integers(0, 20), max_size=4),
    values=st.lists(st.floats(-1, 21, width=32), min_size=1, max_size=20),
)
def test_a_table_expanded_to_a_refinement_gives_every_timestep_the_row_it_had(first, second, values):
    coarse = tuple(float(b) for b in sorted(first))
    finer = refine(coarse, tuple(float(b) for b in sorted(second)))
    table = torch.arange(len(coarse) + 1.0)[:, None]
    t = torch.tensor(values)
    expanded = expand(table, coarse, finer)
    assert torch.equal(expanded[group_of(t, finer).clamp(max=len(expanded) - 1)], table[group_of(t, coarse)])


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_the_noisiest_token_of_a_timestep_of_any_shape_selects_the_group(shape, dtype):
    boundaries = boundary_table([(100.0, 500.0), (300.0,)])
    assert boundaries.shape == (2, 2)
    groups = TimestepGroups(2)
    t = torch.zeros(shape, dtype=dtype)
    t.view(-1)[-1] = 400
    groups.select(boundaries, t)
    assert groups.index.tolist() == [1, 1]
    groups.select(boundaries, 1000 - t, descending=False)
    assert groups.index.tolist() == [2, 1]


def test_selecting_writes_in_place():
    groups = TimestepGroups()
    before = groups.index.data_ptr()
    groups.select(boundary_table([(5.0,)]), torch.tensor([9]))
    assert groups.index.data_ptr() == before
    assert not groups.state_dict()
