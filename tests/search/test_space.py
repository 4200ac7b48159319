# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import diffusers_dq as dq
from diffusers_dq.costs import Choice
from diffusers_dq.search.limits import BitOpsOf
from diffusers_dq.search.space import Space
from diffusers_dq.search.trial import Layer, Trial, layers_of

FOUR, EIGHT = Choice(4, 8), Choice(8, 8)
LAYERS = [
    Layer("a.q", 8, 96, FOUR, False, "a.q"),
    Layer("a.k", 8, 96, FOUR, False, "a.q"),
    Layer("a.v", 8, 96, EIGHT, True, "a.q"),
    Layer("b", 8, 64, FOUR, False, "b"),
]


def space(by_site):
    return Space.of(LAYERS, lambda layer: (FOUR, EIGHT), by_site)


def test_linears_of_a_site_are_one_gene_but_for_those_the_configuration_names():
    assert space(True).genes == (("a.q", "a.k"), ("a.v",), ("b",))
    assert space(False).genes == (("a.q",), ("a.k",), ("a.v",), ("b",))
    assert space(True).options == ((FOUR, EIGHT), (EIGHT,), (FOUR, EIGHT))


def test_a_configuration_says_its_genes_and_genes_their_configuration():
    config = dq.DQConfig("rtn", 4, 8, overrides={"a.v": {"weight_bits": 8}})
    made = space(True).configured(config, (1, 0, 0))
    assert list(made.overrides) == ["a.v", "a.q", "a.k", "b"]
    assert space(True).genes_of(made) == (1, 0, 0)
    assert space(True).genes_of(config) == (0, 0, 0)


@pytest.mark.parametrize("bits", [dict(weight_bits=6), dict(activation_bits=6)])
def test_a_start_outside_the_space_is_refused(bits):
    outside = dq.DQConfig("rtn", 4, 8, overrides={"a.v": {"weight_bits": 8}, "b": bits})
    with pytest.raises(ValueError, match="start: b is .* and the search knows W4A8, W8A8"):
        space(True).genes_of(outside)


def test_options_that_a_width_does_not_allow_are_dropped():
    possible = {"a.q": [FOUR, EIGHT], "a.k": [EIGHT], "a.v": [EIGHT], "b": [FOUR, EIGHT]}
    assert space(True).limited_to(possible).options == ((EIGHT,), (EIGHT,), (FOUR, EIGHT))


def test_a_uniform_size_is_the_next_legal_one_below():
    assert BitOpsOf(128).choice(FOUR, 96) == Choice(4, 8, 96)
    assert BitOpsOf(64).choice(FOUR, 96) == Choice(4, 8, 32)
    assert BitOpsOf(64).choice(FOUR, 72) == Choice(4, 8, 0)


def test_search_bits_leaves_out_bits_that_a_width_does_not_allow():
    from support import CALLS, tiny_pipeline

    pipe = tiny_pipeline()
    name = "transformer_blocks.0.ff.net.2"
    narrow = torch.nn.Linear(30, 32)  # no multiple of 4, so 6 bits cannot be packed
    pipe.transformer.transformer_blocks[0].ff.net[0].proj = torch.nn.Linear(32, 30)
    pipe.transformer.set_submodule(name, narrow)
    run = dict(num_inference_steps=2, population=6, generations=1, progress=False)
    found = dq.search_bits(pipe, dq.DQConfig("rtn", 4, 8), CALLS, budget=8.0, bits=(6, 8), **run)
    assert found.bits_of(name).weight == 8
    assert 6 in {override["weight_bits"] for override in found.overrides.values()}


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_budget_worked_out_from_uniform_bits_allows_just_these(bits):
    """As 6 + 5 / 24 bits, which no float holds."""
    from support import CALLS, tiny_pipeline

    pipe = tiny_pipeline(num_attention_heads=9)
    config = dq.DQConfig("rtn", bits, 8)
    layers = layers_of(pipe.transformer, config, None)
    trial = Trial(pipe.transformer, config, None, {layer.name: [layer.own] for layer in layers})
    stored = sum(trial.stored_bits(layer.name, layer.own) for layer in layers)
    budget = stored / sum(layer.weights for layer in layers)
    run = dict(num_inference_steps=1, population=1, generations=0, progress=False)
    found = dq.search_bits(pipe, config, CALLS, budget=budget, bits=(bits,), **run)
    assert {override["weight_bits"] for override in found.overrides.values()} == {bits}
