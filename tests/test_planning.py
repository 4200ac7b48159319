# SPDX-License-Identifier: Apache-2.0
"""What the planner decides, against brute force on the tensors that the statistics were taken of."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline
from peft import LoraConfig, inject_adapter_in_model
from support import CALLS, tiny_dit, tiny_pipeline
from torch import nn

import diffusers_dq as dq
import diffusers_dq_kernels as ops
from diffusers_dq import affine
from diffusers_dq.config import DQConfig
from diffusers_dq.fingerprint import fingerprint_of
from diffusers_dq.inputs import InputMoments, static_range
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.planning import make_plan
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.specs import spec_of
from diffusers_dq.statistics import SiteStatistics
from diffusers_dq.timesteps import group_of
from diffusers_dq.transforms import Chain, Rotate, Scale, Shift

STEPS = 10
STATIC = QuantScheme(bits=8, granularity="tensor", symmetric=False)


@pytest.fixture(scope="module")
def statistics():
    return dq.calibrate(tiny_pipeline(), CALLS, num_inference_steps=STEPS, progress=False)


def plan_of(statistics, **config):
    model, settings = tiny_dit(), DQConfig(**config)
    return model, make_plan(model, spec_of(model), settings.make_method(), settings, statistics)


@pytest.mark.parametrize("ranges", ["model", "group"])
def test_static_ranges_cover_the_transformed_input_and_no_more(statistics, ranges):
    _, plan = plan_of(statistics, method="htg", groups=3, search="minmax", ranges=ranges)
    name = "transformer_blocks.1.attn1.to_q"
    linear, site = plan.linears[name], statistics.sites[name]
    group = group_of(statistics.timesteps, linear.chain.boundaries)
    shift, scale, *constant = linear.chain.transforms
    divisor = scale.s * (constant[0].s if constant else 1)
    low, high = ((bound - shift.z[group]) / divisor for bound in (site.minimum, site.maximum))
    for g in range(3 if ranges == "group" else 1):
        steps = group == g if ranges == "group" else slice(None)
        expected = affine.affine_parameters(low[steps].min(), high[steps].max(), STATIC)
        found = linear.input_range.scale[g], linear.input_range.zero_point[g]
        assert torch.allclose(found[0], expected[0], rtol=1e-6)
        assert found[1] == expected[1]


def test_a_searched_range_sees_every_channel():
    """More values than are looked at, and outliers in channels that a stride over values would step over."""
    x = torch.randn(40, 8, 1024, generator=torch.Generator().manual_seed(0))
    plain, odd = x.clone(), x.clone()
    plain[..., 0] *= 30
    odd[..., 1] *= 30

    def found(x: torch.Tensor) -> torch.Tensor:
        site = SiteStatistics((), x.amin(1), x.amax(1), x.bfloat16(), torch.zeros(40, 8))
        return static_range(site, torch.arange(40.0), Chain(), STATIC, "mse").scale

    assert torch.allclose(found(plain), found(odd), rtol=0.25)


def test_the_scale_of_a_group_balances_the_largest_weight_of_all_its_linears(statistics):
    model = tiny_dit()
    names = [f"transformer_blocks.0.attn1.to_{letter}" for letter in "qkv"]
    with torch.no_grad():
        model.get_submodule(names[1]).weight[0, 5] = 7.0  # a key's, which q alone does not show
    spec, settings = spec_of(model), DQConfig("htg", groups=1, ema=0.0)
    of_this_model = replace(statistics, fingerprint=fingerprint_of(model))
    chain = make_plan(model, spec, settings.make_method(), settings, of_this_model).linears[names[0]].chain
    shift, scale, *_ = chain.transforms
    site = statistics.sites[names[0]]
    m = torch.maximum(site.maximum[-1] - shift.z[0], shift.z[0] - site.minimum[-1])
    assert torch.allclose(scale.s[5], (m[5] / 7.0).sqrt())


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("dynamic", [True, False])
@torch.no_grad()
def test_activation_bits_are_the_number_of_levels(statistics, monkeypatch, bits, dynamic):
    pipe = tiny_pipeline()
    config = DQConfig("rtn", activation_bits=bits, dynamic=dynamic)
    dq.quantize(pipe, config, statistics=statistics, progress=False)
    layer = pipe.transformer.get_submodule("transformer_blocks.0.ff.net.2")
    seen = []
    name = "quantize_dynamic" if dynamic else "quantize_static"
    original = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *arguments: seen.append(original(*arguments)) or seen[-1])
    layer(torch.randn(2, 40, layer.in_features) * 5)
    q = seen[0][0] if dynamic else seen[0]
    limit = 2 ** (bits - 1)
    assert q.max() == limit - 1
    assert q.min() >= -limit
    assert len(q.unique()) > limit / 2


@torch.no_grad()
def test_a_dynamic_scale_for_the_whole_tensor():
    pipe = tiny_pipeline()
    linear = pipe.transformer.transformer_blocks[0].ff.net[2]
    dq.quantize(pipe, DQConfig("rtn", granularity="tensor"), progress=False)
    layer = pipe.transformer.transformer_blocks[0].ff.net[2]
    assert isinstance(layer, QuantizedLinear)
    x = torch.randn(3, 7, linear.in_features, generator=torch.Generator().manual_seed(0))
    x[2, 6] *= 9  # the last token sets the scale of all
    scale = x.abs().max() / 127
    u = torch.round(x / scale).clamp(-128, 127) * scale
    weight = layer.integer_weight() * layer.weight_scale[:, None]
    assert torch.allclose(layer(x), nn.functional.linear(u, weight, linear.bias), atol=1e-4)  # fp32 sums of 128


def test_range_search_is_the_best_of_all_eighty_with_and_without_importance():
    x = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) ** 3
    importance = torch.rand(500, generator=torch.Generator().manual_seed(1)) ** 4
    scheme = QuantScheme(bits=4, granularity="channel")
    low, high = x.amin(1), x.amax(1)
    shrinks = [1 - i / 100 for i in range(80)]
    for h in (None, importance):
        candidates = torch.stack([affine.affine_parameters(low * f, high * f, scheme)[0] for f in shrinks])  # [80, 3]
        s = candidates[..., None]
        difference = (x - torch.round(x / s).clamp(-8, 7) * s) * (1 if h is None else h)
        best = candidates.gather(0, difference.abs().pow(2.4).sum(-1).argmin(0)[None])[0]
        assert torch.allclose(affine.search_range(x, low, high, scheme, h)[0], best, rtol=1e-5)
    plain, weighted = (affine.search_range(x, low, high, scheme, h)[0] for h in (None, importance))
    assert not torch.equal(plain, weighted)


@pytest.mark.parametrize("method", ["rtn", "htg"])
def test_a_model_that_carries_an_adapter_is_refused(statistics, method):
    pipe = tiny_pipeline()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), pipe.transformer)
    with pytest.raises(ValueError, match=r"to_q is a peft.*Fuse or unload adapters first"):
        dq.quantize(pipe, DQConfig(method), statistics=None if method == "rtn" else statistics, progress=False)


def test_fused_projections_are_refused():
    pipe = tiny_pipeline()
    pipe.transformer.transformer_blocks[0].attn1.fuse_projections()
    with pytest.raises(ValueError, match="call unfuse_qkv_projections"):
        dq.quantize(pipe, DQConfig("rtn"), progress=False)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("centred", [None, (), (250.0,), (150.0, 250.0)])
def test_moments_of_any_chain_follow_from_those_of_the_input(rotated, centred):
    """sum u u^T against the tokens themselves; about the means of groups where the bias takes care of them."""
    generator = torch.Generator().manual_seed(0)
    timesteps, boundaries, k = torch.tensor([400.0, 300.0, 200.0, 100.0]), (250.0,), 8
    tokens = [torch.randn(n, k, generator=generator, dtype=torch.float64) + n for n in (3, 5, 4, 6)]
    moments = InputMoments(
        products=sum(x.T @ x for x in tokens),
        sums=torch.stack([x.sum(0) for x in tokens]),
        counts=torch.tensor([len(x) for x in tokens]),
        timesteps=timesteps,
    )
    z, s = torch.randn(2, k, generator=generator).double(), torch.rand(k, generator=generator).double() + 0.5
    chain = Chain((Shift(z), Scale(s)), boundaries, Rotate.random(k, seed=1) if rotated else None)
    group = group_of(timesteps, boundaries)
    u = [chain.forward(x[None], group[i : i + 1])[0] for i, x in enumerate(tokens)]
    if centred is not None:
        of_centre = group_of(timesteps, centred)
        for g in set(of_centre.tolist()):
            members = [i for i in range(4) if of_centre[i] == g]
            mean = torch.cat([u[i] for i in members]).mean(0)
            for i in members:
                u[i] = u[i] - mean
    expected = sum(x.T @ x for x in u)
    assert torch.allclose(moments.transformed(chain, centred), expected, rtol=1e-10, atol=1e-9)


def test_gptq_asks_for_second_moments_or_samples(statistics):
    with pytest.raises(ValueError, match="calibrate with second_moments=True, or with samples=32"):
        plan_of(replace(statistics, samples=()), method="rtn", rounding="gptq")
    with pytest.raises(ValueError, match="needs statistics"):
        plan_of(None, method="rtn", rounding="gptq")


def test_an_expert_that_some_steps_do_not_reach_is_taken_as_at_the_nearest_and_said(dit_folder, dit_statistics):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    name = "transformer_blocks.0.ff.net.2"
    site = dit_statistics.sites[name]
    minimum, maximum = site.minimum.clone(), site.maximum.clone()
    minimum[2], maximum[2] = torch.inf, -torch.inf
    holed = replace(site, minimum=minimum, maximum=maximum)
    assert torch.equal(holed.filled().maximum[2], site.maximum[1]) and holed.filled().visited.all()
    statistics = replace(dit_statistics, sites={**dit_statistics.sites, name: holed})
    report = dq.quantize(pipe, dq.DQConfig("htg", groups=2), statistics=statistics, progress=False)
    step = f"{float(dit_statistics.timesteps[2]):g}"
    assert f"not reached at 1 calibrated timesteps ({step})" in next(
        r.reason for r in report.linears if r.name == name
    )


def test_a_linear_that_runs_without_gradients_is_not_said_to_have_learned(dit_folder, dit_statistics):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    block = pipe.transformer.transformer_blocks[1]
    block.ff.forward = torch.no_grad()(block.ff.forward)  # as diffusers runs HiDream's experts
    config = dq.DQConfig("rtn", weight_bits=4, rounding="adaround", reconstruction=dict(iterations=2))
    report = dq.quantize(pipe, config, statistics=dit_statistics, progress=False)
    unlearned = {row.name for row in report.linears if "nothing was learned" in row.reason}
    assert unlearned == {"transformer_blocks.1.ff.net.0.proj", "transformer_blocks.1.ff.net.2"}


def test_what_a_norm_carries_makes_no_channel_smaller(statistics):
    """In bf16 1 + (m scale + (m - 1)) loses what m is below one. The chain of to_out is carried by weights: exact."""
    _, plan = plan_of(statistics, method="htg", groups=2)
    for name, linear in plan.linears.items():
        if linear.chain.transforms and name.endswith(("to_q", "net.0.proj")):
            multiplier, _ = linear.chain.as_affine(32)
            assert float(multiplier.min()) == pytest.approx(1) and len(linear.chain.transforms) == 3
    assert len(plan.linears["transformer_blocks.0.attn1.to_out.0"].chain.transforms) == 2
