# SPDX-License-Identifier: Apache-2.0
"""G4W+P4A: one static range after shifting and scaling groups, against ranges of their own."""

import pytest
import torch
from diffusers import DiTPipeline

import diffusers_dq as dq
from diffusers_dq import affine
from diffusers_dq.inputs import static_range
from diffusers_dq.methods import METHODS, Site
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.statistics import SiteStatistics
from diffusers_dq.transforms import Chain

STEPS, SIZE = 3, 32
TIMESTEPS = torch.tensor([900.0, 500.0, 100.0])
STATIC = QuantScheme(bits=8, granularity="tensor", symmetric=False)
NONE = torch.zeros(STEPS, dtype=torch.int64)


def site(middle: list[float], half: list[float]) -> tuple[Site, torch.Tensor]:
    """Groups of 32 channels that fill [middle - half, middle + half], ends included; and the inputs [S, R, K]."""
    x = 2 * torch.rand(STEPS, 40, len(half), SIZE, generator=torch.Generator().manual_seed(0)) - 1
    x[1, 0, :, 4], x[2, 3, :, 9] = 1.0, -1.0
    x = (x * torch.tensor(half)[:, None] + torch.tensor(middle)[:, None]).flatten(2)
    statistics = SiteStatistics((), x.amin(1), x.amax(1), x[:, :8].bfloat16(), torch.zeros(STEPS, 8))
    of_weight = QuantScheme(bits=4, granularity="group", symmetric=False, group_size=SIZE)
    weight = torch.randn(16, x.shape[-1], generator=torch.Generator().manual_seed(1))
    return Site("a", (weight,), statistics, True, has_producer=False, weight_schemes=(of_weight,), scheme=STATIC), x


def chain_of(site: Site) -> Chain:
    method = METHODS["g4w_p4a"]
    return method(method.Options()).solve([site], TIMESTEPS).chains["a"]


def test_one_range_rounds_as_a_range_of_each_group_would():
    """Bit for bit: half ranges are powers of two whose mean is 1, so scaling by them rounds nothing."""
    middle, half = [0.0, 3.0, -1.5, 8.0], [0.5, 0.5, 1.0, 2.0]
    s, x = site(middle, half)
    chain = chain_of(s)
    found = static_range(s.statistics, TIMESTEPS, chain, STATIC, "minmax")
    integers = affine.quantize(chain.forward(x, NONE), found.scale, found.zero_point, STATIC)
    for g, (m, h) in enumerate(zip(middle, half, strict=True)):
        scale, zero = affine.affine_parameters(torch.tensor(-h), torch.tensor(h), STATIC)
        channels = slice(g * SIZE, (g + 1) * SIZE)
        assert torch.equal(integers[..., channels], affine.quantize(x[..., channels] - m, scale, zero, STATIC))
        assert integers[..., channels].int().max() - integers[..., channels].int().min() >= 254, "all of the range"


def test_every_group_fills_the_common_range():
    s, x = site([10.0, -3.0, 0.1], [0.3, 7.0, 1.1])
    u = chain_of(s).forward(x, NONE).unflatten(2, (-1, SIZE))
    half = (0.3 + 7.0 + 1.1) / 3
    assert torch.allclose(u.amax((0, 1, 3)), torch.full((3,), half), rtol=1e-5)  # fp32 of middles of size 10
    assert torch.allclose(u.amin((0, 1, 3)), torch.full((3,), -half), rtol=1e-5)


def test_scaling_groups_costs_a_weight_in_the_same_groups_nothing():
    """The scale of a group is one number, so the rounded weight is the unscaled one's, times it."""
    s, _ = site([0.0, 0.0], [0.5, 1.5])
    scheme, scale = s.weight_schemes[0], chain_of(s).transforms[1].s
    plain = affine.quantize_weight(s.weights[0], scheme)
    folded = affine.quantize_weight(s.weights[0] * scale, scheme)
    assert torch.equal(folded.integers, plain.integers)
    assert torch.allclose(folded.scale, plain.scale * scale[::SIZE], rtol=1e-6)


def test_input_and_weight_together_compute_the_same():
    s, x = site([10.0, -3.0], [0.3, 7.0])
    chain, weight = chain_of(s), s.weights[0].double()
    folded, bias = chain.fold(weight, torch.zeros(1, 16, dtype=torch.float64))
    output = chain.forward(x.double(), NONE) @ folded.T + bias
    assert torch.allclose(output, x.double() @ weight.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("half", [[0.0, 1.0], [0.0, 0.0]], ids=["one group", "all"])
def test_a_group_that_never_changes_stays_within_fp16(half):
    """Folded upstream into half precision, and met by an input that differs after all."""
    s, x = site([2.0, 0.0], half)
    chain = chain_of(s)
    multiplier, offset = chain.as_affine(2 * SIZE)
    assert multiplier.max() < 65504 and torch.isfinite(multiplier.half()).all() and (multiplier > 0).all()
    assert torch.isfinite(chain.forward(x + 1, NONE)).all() and torch.isfinite(offset).all()


def test_without_groups_nothing_is_changed():
    s, _ = site([1.0], [1.0])
    plain = Site(**{**vars(s), "weight_schemes": (QuantScheme(bits=8, granularity="channel"), None)})
    method = METHODS["g4w_p4a"]
    assert not method(method.Options()).solve([plain], TIMESTEPS).chains


def test_weights_are_rounded_by_gptq_in_groups_and_inputs_statically(dit_folder, dit_statistics):
    config = dq.DQConfig("g4w_p4a", weight_bits=4)
    assert (config.recipe.rounding, config.recipe.group_size) == ("gptq", 128)
    pipe = DiTPipeline.from_pretrained(dit_folder)
    dq.quantize(pipe, config, statistics=dit_statistics, progress=False)
    down = pipe.transformer.transformer_blocks[0].ff.net[2]
    assert down.layout.group_size == 128 and down.layout.weight_zero_points
    assert down.layout.static and down.layout.range_groups == 1 and down.input_shift is not None
