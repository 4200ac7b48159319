# SPDX-License-Identifier: Apache-2.0
"""HTG against the paper's equations, restated here with plain loops."""

import dataclasses

import pytest
import torch

from diffusers_dq.methods import METHODS, Site
from diffusers_dq.methods.htg import ema
from diffusers_dq.statistics import SiteStatistics
from diffusers_dq.timesteps import group_of

T, K = 40, 6
TIMESTEPS = torch.arange(T).flip(0) * 25.0 + 1  # 976 .. 1, as a pipeline visits them


def statistics(seed: int = 0, tokens: int = 50) -> tuple[SiteStatistics, torch.Tensor]:
    """Drifting activations X_t [T, tokens, K] and their statistics."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(T, 1, K, generator=generator).cumsum(0)
    x = drift + torch.randn(T, tokens, K, generator=generator) * (1 + torch.arange(K))
    return SiteStatistics((), x.amin(1), x.amax(1), x[:, :8].bfloat16(), torch.zeros(T, 8)), x


def site(name: str = "a", seed: int = 0, producer: bool = True) -> Site:
    weight = torch.randn(4, K, generator=torch.Generator().manual_seed(seed + 100))
    return Site(name, (weight,), statistics(seed)[0], transformable=True, has_producer=producer)


def solve(sites=None, **options):
    method = METHODS["htg"]
    return method(method.Options(**options)).solve(sites or [site()], TIMESTEPS).chains


@pytest.mark.parametrize("groups", [1, 4, T])
def test_shift_and_scale_follow_equations_2_4_and_7(groups):
    chain = solve(groups=groups, ema_steps=None)["a"]
    shift, scale = chain.transforms
    _, x = statistics()
    group = group_of(TIMESTEPS, chain.boundaries)
    z = (x.amax(1) + x.amin(1)) / 2
    for g in range(groups):
        assert torch.allclose(shift.z[g], z[group == g].mean(0))
    m = None
    for t in range(T):  # noisiest first: the paper's T down to 1
        brute = (x[t] - shift.z[group[t]]).abs().amax(0)
        m = brute if m is None else 0.99 * m + 0.01 * brute
    weight = site().weights[0]
    assert torch.allclose(scale.s, (m / weight.abs().amax(0)).sqrt(), rtol=1e-5)  # fp32 sums of 40 terms


def test_as_many_groups_as_steps_keep_every_shift_and_one_group_their_mean():
    stats, _ = statistics()
    z = (stats.maximum + stats.minimum) / 2
    every = solve(groups=T)["a"].transforms[0].z
    assert torch.equal(every, z.flip(0))  # tables ascend in timestep
    assert torch.allclose(solve(groups=1)["a"].transforms[0].z, z.mean(0, keepdim=True), atol=1e-5)


def test_the_papers_number_of_groups():
    assert len(solve()["a"].boundaries) + 1 == T // 10


def test_ema_ends():
    magnitude = torch.rand(T, K)
    assert torch.equal(ema(magnitude, 0.0), magnitude[-1])
    assert torch.equal(ema(magnitude, 1.0), magnitude[0])


def test_ema_gives_the_first_step_the_same_weight_for_any_number_of_steps():
    """With 100 steps alpha = 0.99 leaves the noisiest step 0.99^99 = 37 percent; rescaled, 50 steps leave as much."""
    method = METHODS["htg"]
    for steps in (20, 50, 100, 250):
        alpha = method(method.Options())._alpha(steps)
        assert alpha**steps == pytest.approx(0.99**100)
    assert method(method.Options(ema_steps=None))._alpha(50) == 0.99


def test_scope_layer_partitions_each_site_alone_and_scope_model_all_together():
    sites = [site("a", 0), site("b", 7)]
    together = solve(sites, groups=4, scope="model")
    alone = solve(sites, groups=4, scope="layer")
    assert together["a"].boundaries == together["b"].boundaries
    assert alone["a"].boundaries != alone["b"].boundaries
    assert alone["b"].boundaries == solve([sites[1]], groups=4)["b"].boundaries


def test_a_site_in_other_units_has_no_more_say_in_the_common_partition():
    sites = [site("a", 0), site("b", 7)]
    stats = sites[1].statistics
    scaled = dataclasses.replace(stats, minimum=stats.minimum * 1000, maximum=stats.maximum * 1000)
    louder = [sites[0], dataclasses.replace(sites[1], statistics=scaled)]
    assert solve(sites, groups=4)["a"].boundaries == solve(louder, groups=4)["a"].boundaries


def test_rising_timesteps_are_still_averaged_in_the_order_of_denoising():
    method = METHODS["htg"]
    solver = method(method.Options(groups=1, ema=1.0))
    falling = solver.solve([site()], TIMESTEPS).chains["a"].transforms[1].s
    rising = solver.solve([site()], 1000 - TIMESTEPS).chains["a"].transforms[1].s
    assert torch.equal(falling, rising)


def test_inputs_without_a_producer_are_left_as_the_paper_leaves_fc2_unless_asked():
    sites = [site("a"), site("fc2", producer=False)]
    assert set(solve(sites)) == {"a"}
    assert set(solve(sites, online=True)) == {"a", "fc2"}
    assert set(solve([sites[1]])) == {"fc2"}, "an architecture without producers is transformed online"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(groups=0), "at least 1, got 0"),
        (dict(ema=1.5), "between 0 and 1, got 1.5"),
        (dict(ema_steps=0), "at least 1 or None"),
        (dict(linkage="single"), "optimal, ward, average, centroid; got 'single'"),
        (dict(scope="block"), "model, layer"),
    ],
)
def test_options_out_of_range_say_what_is_possible(options, message):
    with pytest.raises(ValueError, match=message):
        METHODS["htg"].Options(**options)


def test_more_groups_than_steps():
    with pytest.raises(ValueError, match="calibrated steps, 40; got 41"):
        solve(groups=41)
