# SPDX-License-Identifier: Apache-2.0
"""AWQ's scale against its formula, and its search against all candidates."""

from dataclasses import replace

import pytest
import torch

from diffusers_dq import affine
from diffusers_dq.config import DQConfig
from diffusers_dq.methods import METHODS, Site
from diffusers_dq.methods.awq import ALPHAS, importance
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.statistics import SiteStatistics
from diffusers_dq.transforms import Chain, Scale

STEPS, K = 4, 64
WEIGHT = QuantScheme(bits=4, granularity="group", symmetric=False, group_size=32)


def site(producer: bool = True, outlier: float = 30) -> Site:
    """Inputs of which one channel is 30 times as large: its column deserves a finer rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, 8, K, generator=generator)
    x[..., 3] *= outlier
    statistics = SiteStatistics((), x.amin(1), x.amax(1), x.bfloat16(), torch.zeros(STEPS, 8))
    weights = torch.randn(16, K, generator=generator), torch.randn(8, K, generator=generator)
    return Site("a", weights, statistics, True, has_producer=producer, weight_schemes=(WEIGHT, WEIGHT))


def chain_of(site: Site) -> Chain:
    return METHODS["awq"](METHODS["awq"].Options()).solve([site], None).chains["a"]


def scaled(size: torch.Tensor, alpha: float) -> Chain:
    return Chain((Scale(importance(size, alpha)),))


def size_of(site: Site) -> torch.Tensor:
    return site.tokens().abs().mean((0, 1))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.95])
def test_the_scale_is_the_mean_size_to_a_power(alpha):
    size = torch.tensor([4.0, 1.0, 0.25, 9.0])
    wanted = size**alpha / (9.0**alpha * 0.25**alpha) ** 0.5
    assert torch.allclose(importance(size, alpha), wanted, rtol=1e-6)


def test_the_powers_are_the_papers_twenty():
    assert len(ALPHAS) == 20 and ALPHAS[0] == 0 and ALPHAS[-1] == 0.95


def test_the_search_finds_the_best_of_the_twenty():
    s = site()
    errors = {alpha: s.output_error(scaled(size_of(s), alpha)) for alpha in ALPHAS}
    best = min(errors, key=errors.__getitem__)
    assert torch.equal(chain_of(s).transforms[0].s, importance(size_of(s), best))
    assert best > 0 and errors[best] < 0.9 * errors[0.0]


def test_its_error_is_that_of_the_output():
    """|x W^T - (x / s) Q(W diag(s))^T|^2, over all linears that read x, by hand; fp32 sums of 32 x 64 terms."""
    s = site()
    scale, x = importance(size_of(s), 0.5), s.tokens().flatten(0, 1)
    wanted = 0.0
    for weight in s.weights:
        low, high = (f((weight * scale).view(-1, 2, 32), dim=2, keepdim=True) for f in (torch.amin, torch.amax))
        step, zero = affine.affine_parameters(low, high, WEIGHT)
        rounded = affine.rounded((weight * scale).view(-1, 2, 32), step, zero, WEIGHT).view_as(weight)
        wanted += float((x @ weight.T - (x / scale) @ rounded.T).square().sum())
    assert s.output_error(scaled(size_of(s), 0.5)) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dead", [[0], range(8)], ids=["a dead channel", "all dead"])
def test_dead_channels_leave_finite_positive_scales(alpha, dead):
    size = torch.ones(8)
    size[list(dead)] = 0
    s = importance(size, alpha)
    assert torch.isfinite(s).all() and (s > 0).all()
    assert s.max() / s.min() <= 1e4**alpha * (1 + 1e-5)


def test_what_nothing_upstream_carries_is_scaled_only_if_asked_for():
    sites = [replace(site(), name="a"), replace(site(producer=False), name="b")]
    method = METHODS["awq"]
    assert set(method(method.Options()).solve(sites, None).chains) == {"a"}
    assert set(method(method.Options(online=True)).solve(sites, None).chains) == {"a", "b"}
    assert set(method(method.Options()).solve(sites[1:], None).chains) == {"b"}


def test_weights_are_in_groups_of_128_with_zero_points():
    recipe, method = DQConfig("awq", weight_bits=4, activation_bits=16).recipe, METHODS["awq"]
    scheme = method(method.Options()).weight_scheme(4, 1152, recipe.group_size)
    assert scheme == QuantScheme(bits=4, granularity="group", symmetric=False, group_size=128)
