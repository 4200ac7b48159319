# SPDX-License-Identifier: Apache-2.0
"""ViDiT-Q's balancing against its formulas, and the search for alpha against all candidates."""

from dataclasses import replace

import pytest
import torch

from diffusers_dq.methods import METHODS, Site
from diffusers_dq.methods.viditq import ALPHAS
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.statistics import SiteStatistics
from diffusers_dq.transforms import Chain

STEPS, K = 4, 32


def site(producer: bool = True, bits: tuple[int, int] = (4, 8)) -> Site:
    """Inputs whose first channel is 30 times as large, more so in the first step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, 40, K, generator=generator)
    x[..., 0] *= 30
    x[0, :, 0] *= 2
    statistics = SiteStatistics((), x.amin(1), x.amax(1), x[:, :8].bfloat16(), torch.zeros(STEPS, 8))
    weight = torch.randn(16, K, generator=generator)
    of_weight = QuantScheme(bits=bits[0], granularity="channel")
    of_input = None if bits[1] > 8 else QuantScheme(bits=bits[1], granularity="token", dynamic=True)
    return Site("a", (weight,), statistics, True, has_producer=producer, weight_schemes=(of_weight,), scheme=of_input)


def chain_of(site: Site, **options) -> Chain:
    method = METHODS["viditq"]
    return method(method.Options(**options)).solve([site], None).chains["a"]


@pytest.mark.parametrize("window", ["all", "first"])
def test_scale_then_rotation(window):
    s = site()
    chain = chain_of(s, alpha=0.25, window=window)
    largest = s.input_max()[0] if window == "first" else s.input_max().amax(0)
    assert torch.allclose(chain.transforms[0].s, largest**0.25 / s.weight_max() ** 0.75, rtol=1e-5)
    assert chain.rotation is not None and chain.rotation.order == 16
    assert chain_of(s, alpha=0.25, rotate=False).rotation is None


def test_input_and_weight_together_compute_the_same():
    """(X / s) R ((W diag(s)) R)^T = X W^T."""
    s = site()
    chain = chain_of(s)
    x, weight = torch.randn(1, 5, K, dtype=torch.float64), s.weights[0].double()
    u = chain.forward(x, torch.zeros(1, dtype=torch.int64))
    folded, _ = chain.fold(weight, torch.zeros(1, 16, dtype=torch.float64))
    assert torch.allclose(u @ folded.T, x @ weight.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bits", [(4, 8), (8, 4), (4, 16)])
def test_the_search_finds_the_best_alpha(bits):
    s = site(bits=bits)
    errors = {alpha: s.output_error(chain_of(s, alpha=alpha)) for alpha in ALPHAS}
    assert s.output_error(chain_of(s)) == min(errors.values()) < max(errors.values())


def test_balancing_and_rotating_is_better_than_either():
    """As in the paper's ablation, here by the error of one linear with an outlier channel."""
    s = site(bits=(4, 4))
    alone = (
        s.output_error(chain_of(s, rotate=False)),
        s.output_error(METHODS["quarot"](METHODS["quarot"].Options()).solve([s], None).chains["a"]),
    )
    both = s.output_error(chain_of(s))
    assert both < min(alone) < s.output_error(Chain())


def test_what_nothing_upstream_carries_is_still_rotated():
    s = replace(site(producer=False), name="a")
    other = replace(site(), name="b")
    method = METHODS["viditq"]
    chains = method(method.Options(online=False)).solve([s, other], None).chains
    assert not chains["a"].transforms and chains["a"].rotation is not None and chains["b"].transforms


def test_alpha_out_of_range():
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, or None"):
        METHODS["viditq"].Options(alpha=2)
