# SPDX-License-Identifier: Apache-2.0
"""dq.quantize: it finishes or leaves the model as it was, and says what became of each linear."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiTPipeline, UNet2DModel
from support import CALLS, tiny_dit
from torch import nn

import diffusers_dq as dq
from diffusers_dq.linear import QuantizedLinear

HTG = {"method": "htg", "groups": 3, "search": "minmax"}
LINEAR = "transformer_blocks.1.attn1.to_q"


@pytest.fixture
def pipe(dit_folder):
    return DiTPipeline.from_pretrained(dit_folder)


def quantize(model, config, **arguments):
    return dq.quantize(model, dq.DQConfig(**config), progress=False, **arguments)


def layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


# What it reports


def test_every_linear_is_quantized_or_kept_for_a_reason(pipe, dit_statistics):
    report = quantize(pipe, HTG, statistics=dit_statistics)
    linears = {name for name, module in pipe.transformer.named_modules() if isinstance(module, nn.Linear)}
    assert {row.name for row in report.linears} == linears
    assert {row.name for row in report.quantized} == layers(pipe.transformer) == linears - report.kept.keys()
    assert set(report.kept.values()) == {
        "'norm1.emb' is in the architecture's modules_to_not_convert",
        "'proj_out_1' is in the architecture's modules_to_not_convert",
        "'proj_out_2' is in the architecture's modules_to_not_convert",
    }


def test_modules_to_not_convert_replaces_the_architectures_list(pipe):
    report = quantize(pipe, {"method": "rtn", "modules_to_not_convert": ["attn1"]})
    assert report.kept[LINEAR] == "'attn1' is in your modules_to_not_convert"
    assert report.kept["proj_out_2"] == "in no group of linears that is known for DiTTransformer2DModel"
    assert not [name for name in layers(pipe.transformer) if "attn1" in name]


def test_a_linear_with_an_odd_number_of_inputs_is_kept_from_int4():
    model = tiny_dit()
    model.set_submodule(LINEAR, nn.Linear(31, 32))
    report = quantize(model, {"method": "rtn", "weight_bits": 4})
    assert report.kept[LINEAR] == "in_features is odd, and int4 packs two values of a row in a byte"
    assert LINEAR not in layers(model)


def test_the_last_matching_override_wins(pipe):
    overrides = {"*.attn1.*": {"weight_bits": 4}, "*.to_q": {"weight_bits": 8, "activation_bits": 16}}
    report = quantize(pipe, {"method": "rtn", "overrides": overrides})
    bits = {row.name.removeprefix("transformer_blocks.1."): row.bits for row in report.linears}
    assert (bits["attn1.to_q"], bits["attn1.to_k"], bits["ff.net.2"]) == ("W8A16", "W4A8", "W8A8")


# Where statistics come from


def test_statistics_may_be_a_path_or_the_configs_or_calibrated_on_the_way(
    dit_folder, dit_statistics, dit_statistics_path, run_dit
):
    outputs = []
    for config, arguments in [
        (HTG, {"statistics": dit_statistics}),
        (HTG, {"statistics": dit_statistics_path}),
        (HTG | {"statistics": dit_statistics_path}, {}),
        (HTG, {"calls": CALLS, "num_inference_steps": 10}),
    ]:
        pipe = DiTPipeline.from_pretrained(dit_folder)
        quantize(pipe, config, **arguments)
        outputs.append(run_dit(pipe.transformer))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_transformer_alone_may_be_quantized(dit_folder, dit_statistics, run_dit, pipe):
    model = DiTPipeline.from_pretrained(dit_folder).transformer
    for target in (model, pipe):
        quantize(target, HTG, statistics=dit_statistics)
    assert torch.equal(run_dit(model), run_dit(pipe.transformer))


def test_two_pipelines_of_one_process_do_not_know_of_each_other(dit_folder, dit_statistics, run_dit):
    configs = [HTG, {"method": "rtn", "weight_bits": 4}]
    alone, together = [], [DiTPipeline.from_pretrained(dit_folder) for _ in configs]
    for config in configs:
        pipe = DiTPipeline.from_pretrained(dit_folder)
        quantize(pipe, config, statistics=dit_statistics)
        alone.append(run_dit(pipe.transformer))
    for pipe, config in zip(together, configs, strict=True):
        quantize(pipe, config, statistics=dit_statistics)
    for t, step in ((950, 0), (20, 2), (500, 1)):
        for pipe, output in zip(together, alone, strict=True):
            assert torch.equal(run_dit(pipe.transformer, (t,))[0], output[step])


# Failures leave the model as it was


def nan_weight(pipe, monkeypatch):
    with torch.no_grad():
        pipe.transformer.get_submodule(LINEAR).weight[3, 5] = torch.nan


def other_weights(pipe, monkeypatch):
    with torch.no_grad():
        pipe.transformer.proj_out_2.weight.mul_(1.5)


def failing_layer(error):
    def prepare(pipe, monkeypatch):
        from diffusers_dq.building import build_linear

        built = []

        def build(*arguments):
            if len(built) == 5:
                raise error
            built.append(None)
            return build_linear(*arguments)

        monkeypatch.setattr("diffusers_dq.conversion.build_linear", build)

    return prepare


def failing_installation(pipe, monkeypatch):
    def attach(*arguments):
        raise KeyboardInterrupt("in the middle of it")

    monkeypatch.setattr("diffusers_dq.installation.attention.attach", attach)


@pytest.mark.parametrize(
    ("prepare", "config", "error", "message"),
    [
        (failing_installation, {"quantize_attention": True}, KeyboardInterrupt, "in the middle of it"),
        (other_weights, {}, ValueError, "with other weights than this one's"),
        (nan_weight, {}, ValueError, rf"{LINEAR}.weight holds NaN or infinite values"),
        (failing_layer(MemoryError("no memory")), {}, MemoryError, "no memory"),
        (failing_layer(KeyboardInterrupt("stop")), {}, KeyboardInterrupt, "stop"),
        (None, {"overrides": {"*.ff.net.7": {"weight_bits": 8}}}, ValueError, r"'\*.ff.net.7' matches no linear"),
        (None, {"modules_to_not_convert": ["attn3"]}, ValueError, "'attn3' is part of no linear's name"),
        (None, {"groups": 11}, ValueError, "groups must be between 1 and the number of calibrated steps, 10; got 11"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(
    pipe, dit_statistics, run_dit, monkeypatch, prepare, config, error, message
):
    model = pipe.transformer
    if prepare is not None:
        prepare(pipe, monkeypatch)
    before, outputs = {name: tensor.clone() for name, tensor in model.state_dict().items()}, run_dit(model)
    hooks, modules = len(model._forward_pre_hooks), dict(model.named_modules())
    with pytest.raises(error, match=message):
        quantize(pipe, HTG | config, statistics=dit_statistics)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) or after[name].isnan().any() for name in before)
    assert dict(model.named_modules()) == modules
    assert len(model._forward_pre_hooks) == hooks
    assert torch.equal(run_dit(model).nan_to_num(), outputs.nan_to_num())
    assert "quantization_config" not in model.config


# Refusals


def test_statistics_that_are_missing_are_asked_for(pipe):
    with pytest.raises(ValueError, match="method 'htg' with these options needs statistics: calibrate first"):
        quantize(pipe, HTG)


def test_attention_needs_statistics_too(pipe):
    with pytest.raises(ValueError, match="quantize_attention=True needs statistics"):
        quantize(pipe, {"method": "rtn", "quantize_attention": True})


def test_a_layer_that_calibration_never_reached_is_named(pipe, dit_statistics):
    sites = {name: site for name, site in dit_statistics.sites.items() if name != LINEAR}
    with pytest.raises(ValueError, match=f"{LINEAR} was never reached during calibration"):
        quantize(pipe, HTG, statistics=replace(dit_statistics, sites=sites))


def test_quantizing_twice_is_an_error(pipe):
    quantize(pipe, {"method": "rtn"})
    with pytest.raises(ValueError, match="is quantized already; load it in full precision to do it again"):
        quantize(pipe, {"method": "rtn"})


def test_a_config_is_needed(pipe):
    with pytest.raises(ValueError, match="quantize needs a config"):
        dq.quantize(pipe)


def test_a_pipeline_without_a_transformer_is_an_error():
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match="DDPMPipeline has no transformer"):
        quantize(DDPMPipeline(unet, DDPMScheduler()), {"method": "rtn"})


def test_something_else_than_a_pipeline_is_an_error():
    with pytest.raises(ValueError, match="expected a diffusers pipeline or transformer, got Linear"):
        quantize(nn.Linear(4, 4), {"method": "rtn"})


def test_calls_need_a_pipeline_and_a_number_of_steps(pipe):
    with pytest.raises(ValueError, match="give quantize the pipeline, not its transformer alone"):
        quantize(pipe.transformer, HTG, calls=CALLS, num_inference_steps=10)
    with pytest.raises(ValueError, match="calls need num_inference_steps"):
        quantize(pipe, HTG, calls=CALLS)


# The configuration


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "gptq"}, ValueError, "unknown method 'gptq'; known: .*htg.*rtn"),
        (
            {"method": "rtn", "grups": 3},
            TypeError,
            "has no option grups; its options: dynamic, gran",
        ),
        ({"method": "htg", "groups": 0}, ValueError, "groups must be at least 1, got 0"),
        (
            {"method": "rtn", "weight_bits": 3},
            ValueError,
            r"weight_bits must be one of the integers \(4, 6, 8, 16\) .*, got 3",
        ),
        ({"method": "rtn", "activation_bits": 9}, ValueError, "activation_bits must be one of .*, got 9"),
        ({"method": "rtn", "weight_bits": 16}, ValueError, "with activation_bits=8 has no integer product"),
        ({"method": "rtn", "overrides": {"*": {"bits": 4}}}, ValueError, r"overrides\['\*'\] sets \['bits'\]"),
        ({"method": "rtn", "overrides": {"*": {"weight_bits": 5}}}, ValueError, "weight_bits must be one of"),
        ({"method": "rtn", "modules_to_not_convert": "attn"}, ValueError, "must be a list of strings, got 'attn'"),
        ({"method": "rtn", "quant_method": "bnb"}, ValueError, "quant_method is 'bnb', a DQConfig's is"),
        (
            {"method": "rtn", "activation_bits": 16, "quantize_attention": True},
            ValueError,
            "rounds to activation_bits, which is 16",
        ),
    ],
)
def test_a_config_that_cannot_be_carried_out_is_an_error(arguments, error, message):
    with pytest.raises(error, match=message):
        dq.DQConfig(**arguments)


# An architecture without a spec


@pytest.fixture(scope="module")
def unknown_statistics(tiny_unknown, unknown_call):
    return dq.calibrate(tiny_unknown(), [unknown_call], num_inference_steps=6, progress=False)


def test_transforms_alone_leave_an_unknown_architecture_as_it_was(tiny_unknown, run_unknown, unknown_statistics):
    model = tiny_unknown().transformer.double()
    before = run_unknown(model)
    report = quantize(model, HTG | {"weight_bits": 16, "activation_bits": 16}, statistics=unknown_statistics)
    assert max(row.groups for row in report.quantized) == 3
    after = run_unknown(model)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)  # fp64 rounding of shifts and scales


def test_linears_that_share_an_input_share_a_transform(tiny_unknown, unknown_statistics):
    pipe = tiny_unknown()
    report = quantize(pipe, HTG, statistics=unknown_statistics)
    query, key = (pipe.transformer.get_submodule(f"transformer_blocks.0.attn.to_{letter}") for letter in "qk")
    assert torch.equal(query.input_shift, key.input_shift) and torch.equal(query.input_scale, key.input_scale)
    notes = {row.reason for row in report.quantized}
    assert notes == {"transformed online: nothing upstream can carry it"}


@pytest.mark.parametrize("config", [{"method": "rtn"}, HTG | {"weight_bits": 4}])
def test_an_unknown_architecture_reloads_to_the_same_bits(
    tiny_unknown, run_unknown, unknown_statistics, tmp_path, config
):
    model = tiny_unknown().transformer
    quantize(model, config, statistics=unknown_statistics)
    model.save_pretrained(tmp_path)
    assert torch.equal(run_unknown(type(model).from_pretrained(tmp_path)), run_unknown(model))
