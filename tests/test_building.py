# SPDX-License-Identifier: Apache-2.0
"""One linear from plan to layer: what rounding does to its output, and what makes up for it."""

from dataclasses import replace

import pytest
import torch
from support import CALLS, rebuilt_with_chains, tiny_dit, tiny_pipeline

import diffusers_dq as dq
from diffusers_dq.building import build_linear
from diffusers_dq.inputs import InputSample, static_range
from diffusers_dq.planning import LinearPlan
from diffusers_dq.recipe import Recipe
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.statistics import SiteStatistics
from diffusers_dq.timesteps import TimestepGroups, group_of
from diffusers_dq.transforms import Chain, Scale, Shift

STEPS, TOKENS, N = 6, 64, 24
TIMESTEPS = torch.arange(STEPS).flip(0) * 100.0
STATIC = QuantScheme(bits=8, granularity="tensor", symmetric=False)


def case(weight_bits: int, online: bool = True, k: int = 32, **changes):
    """A linear, inputs x [S, R, K] with a drifting mean, and a plan that shifts and scales them in two groups."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, TOKENS, k, generator=generator) + torch.arange(STEPS)[:, None, None]
    x[..., 0] *= 20
    linear = torch.nn.Linear(k, N)
    torch.nn.init.normal_(linear.weight, generator=generator)
    boundaries = (250.0,)
    group = group_of(TIMESTEPS, boundaries)
    z = torch.stack([x[group == g].mean(dim=(0, 1)) for g in range(2)])
    chain = Chain((Shift(z), Scale(x.abs().amax(dim=(0, 1)).sqrt())), boundaries)
    site = SiteStatistics((), x.amin(1), x.amax(1), x.bfloat16(), torch.zeros(STEPS, TOKENS))
    settings = dict(
        weight_scheme=QuantScheme(bits=weight_bits, granularity="channel"),
        scheme=STATIC,
        chain=chain,
        online=online,
        input_range=static_range(site, TIMESTEPS, chain, STATIC, "minmax"),
        sample=InputSample(x.bfloat16(), TIMESTEPS),
    )
    return linear, x, LinearPlan(**{**settings, **changes})


def run(linear, plan, x):
    """[S, R, N]: each step under its group."""
    groups = TimestepGroups()
    layer = build_linear(linear, plan, 0, groups, torch.float32)
    outputs = []
    for step, group in enumerate(group_of(TIMESTEPS, plan.boundaries)):
        groups.index.fill_(group)
        outputs.append(layer(x[step]))
    return torch.stack(outputs)


@pytest.mark.parametrize("weight_bits, floor", [(8, 35), (4, 15)])
@torch.no_grad()
def test_a_quantized_linear_is_close_to_what_it_replaces(weight_bits, floor):
    """Signal to noise: about 6 dB a bit less the crest factor; a wrong fold or bias would leave next to nothing."""
    linear, x, plan = case(weight_bits)
    expected = linear(x)
    error = run(linear, plan, x) - expected
    assert 10 * torch.log10(expected.square().mean() / error.square().mean()) > floor


@pytest.mark.parametrize("boundaries", [(), (250.0,)], ids=["one range", "a range a group"])
@pytest.mark.parametrize(("bits", "symmetric", "floor"), [(8, True, 35), (4, True, 17), (4, False, 17)])
@torch.no_grad()
def test_static_inputs_meet_weights_by_group(bits, symmetric, floor, boundaries):
    """Input zero points against sums of the weight's groups, folded into the bias where one range serves all."""
    scheme = QuantScheme(bits=bits, granularity="group", symmetric=symmetric, group_size=32)
    linear, x, plan = case(bits, k=64, weight_scheme=scheme)
    site = SiteStatistics((), x.amin(1), x.amax(1), x.bfloat16(), torch.zeros(STEPS, TOKENS))
    found = static_range(site, TIMESTEPS, plan.chain, STATIC, "minmax", boundaries)
    expected, output = linear(x), run(linear, replace(plan, input_range=found), x)
    assert 10 * torch.log10(expected.square().mean() / (output - expected).square().mean()) > floor


@pytest.mark.parametrize("search", ["minmax", "mse", "output"])
@torch.no_grad()
def test_correction_removes_the_mean_error_and_the_shrinkage(search):
    linear, x, _ = case(4)
    x = x.bfloat16().float()  # what the sample holds
    expected = linear(x)
    group = group_of(TIMESTEPS, (250.0,))

    def systematic(corrects: bool) -> tuple[torch.Tensor, torch.Tensor]:
        error = run(linear, case(4, recipe=Recipe(search=search, output_correction=corrects))[2], x) - expected
        mean = torch.stack([error[group == g].mean(dim=(0, 1)) for g in range(2)])
        centred = torch.cat([(expected - expected[group == g].mean(dim=(0, 1)))[group == g] for g in range(2)])
        parts = torch.cat([error[group == g] for g in range(2)])
        shrinkage = (parts * centred).sum(dim=(0, 1)) / centred.square().sum(dim=(0, 1))
        return mean, shrinkage

    (mean, shrinkage), (mean_left, shrinkage_left) = systematic(False), systematic(True)
    # what is left: fp32 tables and sums of 384 tokens
    assert mean_left.abs().max() < 1e-3 < mean.abs().max()
    if search != "minmax":
        assert shrinkage_left.mean().abs() < 0.5 * shrinkage.mean().abs(), "clipping had shrunk the output"


@torch.no_grad()
def test_a_range_a_group_serves_each_group_with_its_own():
    linear, x, plan = case(8)
    x[: STEPS // 2] *= 10  # the noisier half
    site = SiteStatistics((), x.amin(1), x.amax(1), x.bfloat16(), torch.zeros(STEPS, TOKENS))

    def error(boundaries) -> torch.Tensor:
        input_range = static_range(site, TIMESTEPS, Chain(), STATIC, "minmax", boundaries)
        grouped = LinearPlan(QuantScheme(bits=8, granularity="channel"), STATIC, input_range=input_range)
        return (run(linear, grouped, x) - linear(x))[STEPS // 2 :].square().mean()

    assert error((250.0,)) < error(()) / 10


@torch.no_grad()
def test_rows_of_two_partitions_are_refined_to_one():
    """A value projection whose input follows one partition and whose output another."""
    model = tiny_dit().double()
    block = "transformer_blocks.0.attn1"
    chains = {
        f"{block}.to_q": Chain((Shift(torch.randn(3, 32, dtype=torch.float64)),), (200.0, 600.0)),
        f"{block}.to_out.0": Chain((Shift(torch.randn(2, 32, dtype=torch.float64)),), (400.0,)),
    }
    twin = rebuilt_with_chains(model, chains)
    assert len(twin.get_submodule(f"{block}.to_v").bias_groups) == 4
    padded = twin.get_submodule(f"{block}.to_k").bias_groups
    assert len(padded) == 4 and torch.equal(padded[2], padded[3]) and not torch.equal(padded[1], padded[2])
    assert twin.timestep_boundaries.shape[1] == 3
    for step in (0, 199, 201, 399, 401, 599, 601, 999):
        inputs = dict(
            hidden_states=torch.randn(1, 4, 8, 8, dtype=torch.float64),
            timestep=torch.tensor([step]),
            class_labels=torch.tensor([3]),
        )
        assert torch.allclose(twin(**inputs).sample, model(**inputs).sample, rtol=1e-10, atol=1e-10)


def test_a_linear_that_must_not_change_makes_its_neighbours_transform_online():
    pipe = tiny_pipeline()
    statistics = dq.calibrate(pipe, CALLS, num_inference_steps=10, progress=False)
    kept = pipe.transformer.transformer_blocks[0].attn1.to_k
    config = dq.DQConfig("htg", groups=2, modules_to_not_convert=["blocks.0.attn1.to_k", "blocks.1.norm1", "proj_out"])
    report = dq.quantize(pipe, config, statistics=statistics, progress=False)
    assert pipe.transformer.transformer_blocks[0].attn1.to_k is kept
    notes = {row.name: row.reason for row in report.linears}
    assert "to_k reads the same input and stays" in notes["transformer_blocks.0.attn1.to_q"]
    assert "norm1.linear, which would carry it, stays" in notes["transformer_blocks.1.ff.net.0.proj"]
    assert pipe.transformer.transformer_blocks[1].attn1.to_q.input_shift is not None
    assert pipe.transformer.transformer_blocks[0].ff.net[0].proj.input_shift is None
