# SPDX-License-Identifier: Apache-2.0
"""PTQ4DiT against the paper's equations (methods.md, A1)."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline

from diffusers_dq.balancing import balance, spearman
from diffusers_dq.config import DQConfig
from diffusers_dq.methods import METHODS, Site
from diffusers_dq.methods.ptq4dit import salience_over_steps
from diffusers_dq.planning import make_plan
from diffusers_dq.specs import spec_of
from diffusers_dq.statistics import SiteStatistics

T, K = 5, 8


def site(steps: int = T, producer: bool = True) -> Site:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(steps, 20, K, generator=generator) * (1 + torch.arange(K)) + torch.randn(steps, 1, K)
    statistics = SiteStatistics((), x.amin(1), x.amax(1), x[:, :8].bfloat16(), torch.zeros(steps, 8))
    return Site("a", (torch.randn(4, K, generator=generator),), statistics, transformable=True, has_producer=producer)


def scale_of(site: Site, method: str = "ptq4dit", **options) -> torch.Tensor:
    cls = METHODS[method]
    timesteps = torch.arange(len(site.statistics.minimum)).flip(0) * 200.0 + 1
    (scale,) = cls(cls.Options(**options)).solve([site], timesteps).chains["a"].transforms
    return scale.s


def test_salience_is_the_sum_over_steps_weighed_by_rho():
    s = site()
    input_max, weight_max = s.input_max(), s.weight_max()
    rho = spearman(input_max, weight_max).tolist()
    total = sum(math.exp(-r) for r in rho)
    expected = sum(math.exp(-r) / total * row for r, row in zip(rho, input_max.double(), strict=True))
    assert torch.allclose(salience_over_steps(input_max, weight_max).double(), expected, rtol=1e-6)
    assert torch.allclose(scale_of(s), (expected.float() / weight_max).sqrt(), rtol=1e-5)


def test_a_step_counts_more_the_less_input_and_weight_agree():
    weight_max = torch.tensor([1.0, 2.0, 3.0])
    agreeing, opposed = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([3.0, 2.0, 1.0])
    mixed = salience_over_steps(torch.stack([agreeing, opposed]), weight_max)
    share = (agreeing - mixed) / (agreeing - opposed)  # of the opposed step
    assert torch.allclose(share, torch.full((3,), math.e / (math.e + 1 / math.e)))


def test_of_one_step_it_is_balancing_alone_which_is_smoothquant():
    one = site(steps=1)
    balancing = scale_of(one, calibrate_salience=False)
    assert torch.allclose(scale_of(one), balancing, rtol=1e-6)
    assert torch.equal(scale_of(one, "smoothquant"), balancing)


def test_balanced_channels_are_equally_large_in_input_and_weight():
    one = site(steps=1)
    s = scale_of(one)
    assert torch.allclose(one.input_max()[0] / s, one.weight_max() * s, rtol=1e-5)


@pytest.mark.parametrize("method", ["ptq4dit", "smoothquant"])
def test_what_nothing_carries_is_left_alone_unless_asked_for(method):
    cls, alone = METHODS[method], [site(), replace(site(producer=False), name="b")]
    assert set(cls(cls.Options()).solve(alone, None).chains) == {"a"}
    assert set(cls(cls.Options(online=True)).solve(alone, None).chains) == {"a", "b"}
    assert set(cls(cls.Options()).solve(alone[1:], None).chains) == {"b"}, "of an architecture without producers"


def test_smoothquant_takes_the_largest_input_of_all_steps():
    s = site()
    expected = s.input_max().amax(0) ** 0.7 / s.weight_max() ** 0.3
    assert torch.allclose(scale_of(s, "smoothquant", alpha=0.7), expected, rtol=1e-5)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        METHODS["smoothquant"].Options(alpha=alpha)


def test_the_released_codes_salience_is_of_samples_not_of_steps(dit_folder, dit_statistics):
    """Against the largest inputs of each picture, observed here by a hook of its own."""
    model = DiTPipeline.from_pretrained(dit_folder).transformer
    linear, rows = model.transformer_blocks[0].ff.net[0].proj, []
    hook = linear.register_forward_pre_hook(lambda module, args: rows.extend(args[0].detach().abs().amax(1)))
    with torch.no_grad():
        for sample in dit_statistics.samples:
            model(**sample)
    hook.remove()
    weight_max = linear.weight.abs().amax(0)
    expected = balance(salience_over_steps(torch.stack(rows), weight_max), weight_max)
    config = DQConfig("ptq4dit", per_sample=True)
    plan = make_plan(model, spec_of(model), config.make_method(), config, dit_statistics)
    assert torch.allclose(plan.linears["transformer_blocks.0.ff.net.0.proj"].chain.transforms[0].s, expected)
