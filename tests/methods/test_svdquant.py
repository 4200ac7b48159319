# SPDX-License-Identifier: Apache-2.0
"""SVDQuant: its scale, its search, and what the branch leaves to be rounded."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline

import diffusers_dq as dq
from diffusers_dq.methods import METHODS, Site
from diffusers_dq.methods.svdquant import ALPHAS
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.statistics import SiteStatistics
from diffusers_dq.transforms import Chain

STEPS, K, N = 4, 64, 48


def site(low_rank: int = 4, bits: tuple[int, int] = (4, 4), producer: bool = True) -> Site:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, 8, K, generator=generator)
    x[..., 5] *= 40
    statistics = SiteStatistics((), x.amin(1), x.amax(1), x.bfloat16(), torch.zeros(STEPS, 8))
    weight = torch.randn(N, K, generator=generator)
    of_weight = QuantScheme(bits=bits[0], granularity="group", symmetric=False, group_size=64)
    of_input = QuantScheme(bits=bits[1], granularity="group", dynamic=True, group_size=64)
    return Site("a", (weight,), statistics, True, producer, (of_weight,), of_input, low_rank)


def chain_of(site: Site, **options) -> Chain:
    method = METHODS["svdquant"]
    return method(method.Options(**options)).solve([site], None).chains["a"]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_scale_is_smoothquants(alpha):
    s = site()
    wanted = s.input_max().amax(0) ** alpha / s.weight_max() ** (1 - alpha)
    assert torch.allclose(chain_of(s, alpha=alpha).transforms[0].s, wanted, rtol=1e-5)


def test_the_search_finds_the_best_alpha_with_the_branch_in_place():
    s = site()
    errors = {alpha: s.output_error(chain_of(s, alpha=alpha)) for alpha in ALPHAS}
    assert s.output_error(chain_of(s)) == min(errors.values()) < max(errors.values())
    without = replace(s, low_rank=0)
    assert min(errors.values()) < without.output_error(chain_of(without))


def test_outliers_go_into_the_weight_and_there_into_the_branch():
    """The more of them the scale moves, the more the branch is worth: the paper's Fig. 3."""
    s = site()
    gains = [
        replace(s, low_rank=0).output_error(chain_of(s, alpha=alpha)) / s.output_error(chain_of(s, alpha=alpha))
        for alpha in (0.1, 0.9)
    ]
    assert gains[1] > gains[0] > 0.9


def test_a_branch_that_will_not_be_built_is_not_counted_on():
    s = site(low_rank=32)  # 32 (48 + 64) >= 48 x 64
    chain = chain_of(s, alpha=0.5)
    assert s.output_error(chain) == replace(s, low_rank=0).output_error(chain)


def quantized(folder, statistics, **config) -> torch.nn.Module:
    pipe = DiTPipeline.from_pretrained(folder)
    settings = dict(weight_bits=4, activation_bits=4, low_rank=4)
    dq.quantize(pipe, dq.DQConfig("svdquant", **{**settings, **config}), statistics=statistics, progress=False)
    return pipe.transformer


def test_branch_and_integers_are_the_weight_up_to_half_a_step(dit_folder, dit_statistics):
    """W' = U D + Q to half a scale of its group, and W = W' / s."""
    original = DiTPipeline.from_pretrained(dit_folder).transformer
    model = quantized(dit_folder, dit_statistics)
    for i in range(2):
        name = f"transformer_blocks.{i}.ff.net.2"  # scaled online, its rows are nobody's
        layer, weight = model.get_submodule(name), original.get_submodule(name).weight.double()
        assert layer.layout.low_rank == 4 and layer.input_inv_smooth is not None
        difference = (layer.dequantized(torch.float64).weight - weight) / layer.input_inv_smooth
        half = layer.weight_scale.repeat_interleave(layer.layout.group_size, 1) / 2
        assert (difference.abs() <= half * (1 + 1e-4)).all()  # fp32 factors and tables


def test_inputs_are_rounded_in_the_groups_of_the_weight_or_by_token(dit_folder, dit_statistics):
    by_group = quantized(dit_folder, dit_statistics).transformer_blocks[0].ff.net[2].layout
    assert (by_group.input_rounding, by_group.group_size) == ("group", 64)
    by_token = quantized(dit_folder, dit_statistics, activations="token").transformer_blocks[0].ff.net[2].layout
    assert (by_token.input_rounding, by_token.group_size) == ("token", 64)


def test_a_width_that_no_group_divides_is_rounded_by_token():
    method = METHODS["svdquant"]
    assert method(method.Options()).activation_scheme(4, 72, 64).granularity == "token"


def test_the_papers_settings():
    recipe = dq.DQConfig("svdquant", weight_bits=4, activation_bits=4).recipe
    assert (recipe.low_rank, recipe.group_size) == (32, 64)


def test_what_nothing_upstream_carries_is_scaled_online_unless_refused():
    sites = [site(), replace(site(producer=False), name="b")]
    method = METHODS["svdquant"]
    assert set(method(method.Options(alpha=0.5)).solve(sites, None).chains) == {"a", "b"}
    assert set(method(method.Options(alpha=0.5, online=False)).solve(sites, None).chains) == {"a"}


def test_alpha_out_of_range():
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, or None to be searched; got 2"):
        METHODS["svdquant"].Options(alpha=2.0)
