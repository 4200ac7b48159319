# SPDX-License-Identifier: Apache-2.0
"""RepQ-ViT's reparametrisation against its equations."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline

import diffusers_dq as dq
from diffusers_dq.methods import METHODS, Site
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.statistics import SiteStatistics
from diffusers_dq.transforms import Chain

STEPS, TOKENS, K = 4, 300, 16
TIMESTEPS = torch.tensor([900.0, 600.0, 300.0, 0.0])
NONE = torch.zeros(STEPS, dtype=torch.int64)


def site(bits: int = 8, dead: bool = False, producer: bool = True) -> tuple[Site, torch.Tensor]:
    """Channels of different sizes about different means; inputs [S, R, K], all of them sampled."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, TOKENS, K, generator=generator) * (0.2 + torch.arange(K)) + torch.randn(
        K, generator=generator
    )
    if dead:
        x[..., 2] = 0
    x = x.bfloat16().float()
    statistics = SiteStatistics((), x.amin(1), x.amax(1), x.bfloat16(), torch.zeros(STEPS, TOKENS))
    scheme = QuantScheme(bits=bits, granularity="tensor", symmetric=False)
    weight = torch.randn(8, K, generator=generator)
    return Site("a", (weight,), statistics, True, producer, (QuantScheme(bits=8, granularity="channel"),), scheme), x


def solve(sites: list[Site], **options) -> dict[str, Chain]:
    method = METHODS["repq"]
    return method(method.Options(**options)).solve(sites, TIMESTEPS).chains


def by_channel(site: Site, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each channel as Eq. 9 has them, the latter before it is rounded, in fp64."""
    low, high = x.double().amin((0, 1)), x.double().amax((0, 1))
    scale = (high - low) / (site.scheme.qmax - site.scheme.qmin)
    return scale, site.scheme.qmin - low / scale


@pytest.mark.parametrize("bits", [8, 4])
def test_all_channels_end_up_with_one_scale_and_zero_point(bits):
    """x / d_c + z_c = u / d~ + z~ for every channel, so each value has the place between integers that its own
    channel's range gave it: the same integer, in fp64 and away from where both round the other way."""
    s, x = site(bits)
    d, z = by_channel(s, x)
    u = solve([s])["a"].forward(x.double(), NONE)
    own = x.double() / d.double() + z.double()
    common = u / d.double().mean() + z.double().mean()
    assert torch.allclose(own, common, rtol=0, atol=1e-4)  # z~ and d~ are made in fp32, of zero points up to 128


def test_input_and_weight_together_compute_the_same():
    s, x = site()
    chain, weight = solve([s])["a"], s.weights[0].double()
    folded, bias = chain.fold(weight, torch.zeros(1, 8, dtype=torch.float64))
    output = chain.forward(x.double(), NONE) @ folded.T + bias
    assert torch.allclose(output, x.double() @ weight.T, rtol=1e-10, atol=1e-10)


def test_extremes_that_the_sample_does_not_hold_are_covered():
    """Eight tokens a step are far from the largest value of thousands; clipping there costs more than rounding."""
    s, x = site()
    few = replace(s.statistics, tokens=x[:, :8].bfloat16(), keys=torch.zeros(STEPS, 8))
    s = replace(s, statistics=few)
    d, z = by_channel(s, x)
    u = solve([s])["a"].forward(x, NONE)
    q = u.double() / d.mean() + z.mean()
    # fp32 against fp64 of zero points up to 100
    assert q.min() >= -128.001 and q.max() <= 127.001, "256 levels hold every input"
    assert q.max() - q.min() > 254.9, "and are none too many: the extremes are reached"


def test_a_channel_that_is_always_zero_stays_within_fp16():
    s, x = site(dead=True)
    multiplier, offset = solve([s])["a"].as_affine(K)
    assert torch.isfinite(multiplier.half()).all() and torch.isfinite(offset.half()).all()
    assert torch.isfinite(solve([s])["a"].forward(x, NONE)).all()


def test_an_input_that_is_not_rounded_is_treated_as_8_bits():
    s, _ = site()
    chains = [solve([replace(s, scheme=scheme)])["a"] for scheme in (s.scheme, None)]
    assert torch.equal(chains[0].transforms[0].z, chains[1].transforms[0].z)


def test_only_what_a_producer_carries_is_changed_unless_asked_for():
    sites = [site()[0], replace(site(producer=False)[0], name="b")]
    assert set(solve(sites)) == {"a"}
    assert set(solve(sites, online=True)) == {"a", "b"}
    assert set(solve(sites[1:])) == {"b"}


def test_unequal_channels_lose_less_by_it():
    """The error of one linear's output at 4 bits, against a plain static range. Seen: 0.55 of it."""
    s, _ = site(bits=4)
    assert s.output_error(solve([s])["a"]) < 0.7 * s.output_error(Chain())


def test_the_model_has_static_inputs_and_nothing_online(dit_folder, dit_statistics):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    dq.quantize(pipe, dq.DQConfig("repq"), statistics=dit_statistics, progress=False)
    query = pipe.transformer.transformer_blocks[0].attn1.to_q
    assert query.layout.static and query.input_shift is None and query.bias_groups is not None
