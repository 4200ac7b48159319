# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from support import CALLS, assert_close, tiny_dit, tiny_pipeline

import diffusers_dq as dq
from diffusers_dq.costs import Choice
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.search.trial import Trial, layers_of

STEPS = 6


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(num_attention_heads=4)


@pytest.fixture(scope="module")
def statistics(pipe):
    return dq.calibrate(pipe, CALLS, num_inference_steps=STEPS, second_moments=True, progress=False)


@pytest.mark.parametrize(
    "config",
    [
        dq.DQConfig("rtn", 4, 8),
        dq.DQConfig("qdit", 4, 8),
        dq.DQConfig("quarot", 4, 6),
        dq.DQConfig("smoothquant", 8, 8),
        dq.DQConfig("htg", 8, 8, groups=3),
        dq.DQConfig("viditq", 4, 8, rounding="gptq"),
        dq.DQConfig("rtn", 4, 8, dynamic=False, overrides={"*.ff.net.2": {"weight_bits": 8}}),
    ],
    ids=lambda config: config.method,
)
def test_exchanged_layers_compute_what_the_converted_model_computes(pipe, statistics, config, run_dit):
    layers = layers_of(pipe.transformer, config, statistics)
    own = {layer.name: layer.own for layer in layers}
    trial = Trial(pipe.transformer, config, statistics, {name: [choice] for name, choice in own.items()})
    converted = copy.deepcopy(pipe.transformer)
    dq.quantize(converted, config, statistics=statistics, progress=False)
    assert {n for n, m in converted.named_modules() if isinstance(m, QuantizedLinear)} == set(own)
    with trial.using(own) as model:
        found = run_dit(model)
    expected, exact = run_dit(converted), run_dit(pipe.transformer)
    if config.method in ("smoothquant", "htg"):  # a weight that carries a fold is rounded without it here
        assert (found - expected).norm() < (exact - expected).norm()
    else:
        assert_close(found, expected)


def test_linears_come_back_and_the_model_given_is_never_touched(pipe, statistics, run_dit):
    before = copy.deepcopy(pipe.transformer.state_dict())
    expected = run_dit(pipe.transformer)
    config = dq.DQConfig("htg", 4, 8)
    names = [layer.name for layer in layers_of(pipe.transformer, config, statistics)]
    trial = Trial(pipe.transformer, config, statistics, {name: [Choice(4, 8)] for name in names})
    with pytest.raises(KeyboardInterrupt), trial.using(dict.fromkeys(names, Choice(4, 8))) as model:
        assert not torch.equal(run_dit(model), expected)
        raise KeyboardInterrupt
    assert torch.equal(run_dit(trial.model), expected)
    assert not any(isinstance(module, QuantizedLinear) for module in pipe.transformer.modules())
    assert pipe.transformer.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())


@pytest.mark.parametrize("method", ["qdit", "htg", "quarot"])
def test_an_output_error_is_that_of_the_linear_alone(pipe, statistics, method):
    name = "transformer_blocks.0.ff.net.2"
    choices = [Choice(4, 8), Choice(6, 8), Choice(8, 8)]
    trial = Trial(pipe.transformer, dq.DQConfig(method), statistics, {name: choices})
    errors = [trial.output_error(name, choice, statistics) for choice in choices]
    assert 0.2 > errors[0] > 4 * errors[1] > 4 * errors[2] > 0
    assert trial.output_error(name, Choice(16, 16), statistics) == 0


def test_the_error_of_a_rounded_weight_is_the_one_worked_out_by_hand(pipe, statistics):
    name, choice = "transformer_blocks.1.attn1.to_out.0", Choice(4, 16, 32)
    trial = Trial(pipe.transformer, dq.DQConfig("rtn"), statistics, {name: [choice]})
    weight = pipe.transformer.get_submodule(name).weight.detach()
    difference = trial.layer(name, choice).dequantized(torch.float32).weight - weight
    x = statistics.input_of(name).tokens.float().flatten(0, 1)
    expected = (x @ difference.T).square().sum() / (x @ weight.T).square().sum()
    assert trial.output_error(name, choice, statistics) == pytest.approx(float(expected), rel=1e-4)


def test_an_unreached_linear_is_named(pipe, statistics):
    name, choice = "transformer_blocks.1.ff.net.2", Choice(4, 8)
    trial = Trial(pipe.transformer, dq.DQConfig("rtn"), statistics, {name: [choice]})
    others = {site: value for site, value in statistics.sites.items() if name not in value.linears}
    with pytest.raises(ValueError, match=f"{name} was never reached"):
        trial.output_error(name, choice, dq.Statistics(statistics.timesteps, others, statistics.fingerprint))


def test_a_choice_that_a_width_does_not_allow_is_left_out_and_an_empty_list_refused():
    model, name = tiny_dit(), "transformer_blocks.0.attn1.to_q"
    model.set_submodule(name, torch.nn.Linear(30, 32))  # 30 is no multiple of 4, so 6 bits cannot be packed
    some = {name: [Choice(4, 8), Choice(6, 8), Choice(8, 8)]}
    assert Trial(model, dq.DQConfig("rtn"), None, some).choices == {name: [Choice(4, 8), Choice(8, 8)]}
    with pytest.raises(ValueError, match=f"{name} can have none of W6A8"):
        Trial(model, dq.DQConfig("rtn"), None, {name: [Choice(6, 8)]})


def test_a_configuration_that_converts_nothing_is_refused(pipe):
    with pytest.raises(ValueError, match="nothing to choose"):
        layers_of(pipe.transformer, dq.DQConfig("rtn", modules_to_not_convert=["blocks"]), None)
