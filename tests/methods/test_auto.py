# SPDX-License-Identifier: Apache-2.0
"""What `auto` chooses, against all it could have chosen."""

import itertools
from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline

import diffusers_dq as dq
from diffusers_dq.costs import stored_bits
from diffusers_dq.methods import METHODS, Site
from diffusers_dq.methods.auto import WEIGHTS
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.statistics import SiteStatistics

STEPS, K, N = 4, 64, 16
W4, TOKEN = QuantScheme(bits=4, granularity="channel"), QuantScheme(bits=8, granularity="token", dynamic=True)


def site(name: str, size: float, outlier: float = 1.0, **changes) -> Site:
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(STEPS, 8, K, generator=generator) * size
    x[..., 0] *= outlier
    statistics = SiteStatistics((), x.amin(1), x.amax(1), x.bfloat16(), torch.zeros(STEPS, 8))
    weight = torch.randn(N, K, generator=generator)
    weight[:, 5] *= outlier
    settings = dict(has_producer=True, weight_schemes=(W4,), scheme=TOKEN)
    return Site(name, (weight,), statistics, True, **{**settings, **changes})


def solve(*sites: Site, **options):
    method = METHODS["auto"]
    return method(method.Options(**options)).solve(sites, None)


def bits_of(solution, sites) -> float:
    return sum(stored_bits(solution.weight_schemes[s.name], *s.weights[0].shape) for s in sites)


@pytest.mark.parametrize("budget", [4.6, 5.5, 7.0])
def test_the_choice_is_the_best_of_all_combinations_within_the_budget(budget):
    sites = [site("a", 1.0), site("bb", 1.0, outlier=20.0), site("ccc", 30.0, outlier=3.0)]
    solution = solve(*sites, budget=budget)
    method = METHODS["auto"](METHODS["auto"].Options())
    schemes = [method.weight_scheme(bits, K, size) for bits, size in WEIGHTS if size <= K]

    def error(s: Site, scheme: QuantScheme) -> float:
        return replace(s, weight_schemes=(scheme,)).output_error(solution.chains[s.name]) / s.output_energy()

    limit = budget * N * K * len(sites)
    table = {(s.name, scheme): error(s, scheme) for s in sites for scheme in schemes}
    best = min(
        sum(table[s.name, scheme] for s, scheme in zip(sites, choice, strict=True))
        for choice in itertools.product(schemes, repeat=len(sites))
        if sum(stored_bits(scheme, N, K) for scheme in choice) <= limit
    )
    assert bits_of(solution, sites) <= limit
    found = sum(table[s.name, solution.weight_schemes[s.name]] for s in sites)
    assert found == pytest.approx(best, rel=1e-9)  # sums in another order


def test_transforms_are_those_of_least_error():
    s = site("bb", 1.0, outlier=20.0)
    chain = solve(s).chains["bb"]
    others = solve(replace(s, has_producer=False), online=False).chains["bb"]
    assert s.output_error(chain) <= s.output_error(others)
    assert chain.transforms and not others.transforms, "scaled where something can carry it"


def test_the_default_budget_is_what_was_asked_for():
    sites = [site("a", 1.0), site("bb", 1.0, outlier=20.0)]
    values = 2 * N * K
    asked = 2 * stored_bits(W4, N, K)
    assert bits_of(solve(*sites), sites) <= asked
    assert asked < bits_of(solve(*sites, extra_bits=2.0), sites) <= asked + 2 * values


def test_overridden_and_modulation_linears_keep_their_bits():
    free, set_by_user = site("a", 1.0), site("bb", 1.0, overridden=True)
    modulation = replace(site("ccc", 1.0), transformable=False)
    unrounded = site("dddd", 1.0, weight_schemes=(None,), scheme=None)
    assert set(solve(free, set_by_user, modulation, unrounded, budget=8.1).weight_schemes) == {"a"}


def test_a_budget_below_the_cheapest_is_refused():
    with pytest.raises(ValueError, match="cannot be met: the cheapest options take"):
        solve(site("a", 1.0), budget=3.0)


def test_the_file_keeps_within_the_budget_and_overrides_stand(dit_folder, dit_statistics):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    config = dq.DQConfig("auto", weight_bits=4, extra_bits=2.0, overrides={"*.ff.net.2": {"weight_bits": 4}})
    dq.quantize(pipe, config, statistics=dit_statistics, progress=False)
    layers = {name: m for name, m in pipe.transformer.named_modules() if hasattr(m, "layout")}
    assert all(m.layout.weight_bits == 4 for name, m in layers.items() if name.endswith(("ff.net.2", "norm1.linear")))
    assert {m.layout.weight_bits for m in layers.values()} > {4}
