# SPDX-License-Identifier: Apache-2.0
"""A quantized model in use: casts, copies, dequantizing; and how diffusers knows of the quantizer."""

import copy
import json
import pickle

import pytest
import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from safetensors.torch import load_file
from saved_models import HTG, LINEAR, RTN, load, weights_file
from torch import nn

import diffusers_dq as dq
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.quantizer import DQQuantizer, register

# A loaded model


def test_casting_is_refused_and_moving_is_not(quantized, run_dit):
    model = quantized("htg-w4a8").transformer
    outputs = run_dit(model)
    for cast in (lambda: model.to(torch.float16), model.half, model.float):
        with pytest.raises(ValueError, match="quantized model"):
            cast()
    assert torch.equal(run_dit(model.to("cpu")), outputs)


def test_casting_a_part_leaves_tables_and_products_alone(quantized):
    layer = quantized("htg-w4a8").transformer.get_submodule(LINEAR)
    x = torch.randn(5, 32)
    before, tables = layer(x), {name: t.clone() for name, t in layer.tables()}
    for cast in (torch.bfloat16, torch.float16, torch.float32):
        nn.Module.to(layer, cast)
    assert all(torch.equal(tables[name], t) and tables[name].dtype == t.dtype for name, t in layer.tables())
    assert torch.equal(layer(x), before)


def test_a_deep_copy_has_groups_of_its_own(quantized, run_dit):
    model = quantized("htg-w4a8").transformer
    run_dit(model, timesteps=(950,))
    before = model.timestep_groups.index.clone()
    twin = copy.deepcopy(model)
    assert torch.equal(run_dit(twin), run_dit(copy.deepcopy(model)))
    assert not torch.equal(twin.timestep_groups.index, before)
    assert torch.equal(model.timestep_groups.index, before)
    assert all(m.groups is twin.timestep_groups for m in twin.modules() if isinstance(m, QuantizedLinear))
    assert twin.hf_quantizer is not model.hf_quantizer


def test_a_deep_copy_saves_on_its_own(quantized, run_dit, tmp_path):
    model = quantized("htg-w4a8").transformer
    outputs = run_dit(model)
    twin = copy.deepcopy(model)
    del model
    twin.save_pretrained(tmp_path / "transformer")
    assert torch.equal(run_dit(load(tmp_path)), outputs)


def test_the_config_of_a_model_is_json_pickles_and_shows_itself(quantized):
    config = quantized("htg-w4a8").transformer.config.quantization_config
    assert config.quant_method.value == "diffusers_dq"
    assert dq.DQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert '"method": "htg"' in repr(config)
    assert LINEAR not in repr(config)


def test_layers_are_linears_and_the_number_of_parameters_stays(quantized, dit_folder):
    full, model = load(dit_folder), quantized("rtn-w8a8").transformer
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert layers
    assert all(isinstance(layer, nn.Linear) for layer in layers)
    shared = sum(p.numel() for p in full.transformer_blocks[1].norm1.emb.parameters())
    assert model.num_parameters() == full.num_parameters() - shared


# Dequantizing


def test_a_dequantized_model_is_an_ordinary_one(quantized, run_dit, tmp_path):
    model = quantized("rtn-w8a8").transformer
    weight = model.get_submodule(LINEAR).integer_weight() * model.get_submodule(LINEAR).weight_scale[:, None]
    model.dequantize()
    assert torch.equal(model.get_submodule(LINEAR).weight, weight)
    model.save_pretrained(tmp_path / "transformer")
    assert "quantization_config" not in json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert torch.equal(run_dit(load(tmp_path)), run_dit(model))
    assert set(load_file(weights_file(tmp_path))) == set(load(tmp_path).state_dict())
    assert model.to(torch.float16).dtype == torch.float16


def test_a_dequantized_model_may_be_quantized_again(quantized, run_dit):
    model = quantized("rtn-w8a8").transformer
    model.dequantize()
    dq.quantize(model, dq.DQConfig(**RTN), progress=False)
    assert model.is_quantized


@pytest.mark.parametrize("config", [HTG | {"groups": 1, "online": True}, {"method": "quarot"}])
def test_dequantized_transforms_without_rounding_give_the_original(config, dit_folder, dit_statistics, run_dit):
    model = load(dit_folder, torch_dtype=torch.float64)
    before = run_dit(model)
    config = dq.DQConfig(**config, weight_bits=16, activation_bits=16)
    dq.quantize(model, config, statistics=dit_statistics, progress=False)
    model.dequantize()
    assert not [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    torch.testing.assert_close(run_dit(model), before, rtol=1e-10, atol=1e-10)  # folding is exact to fp64 rounding


def test_a_model_with_timestep_groups_cannot_be_dequantized_and_stays_quantized(quantized, run_dit):
    model = quantized("htg-w8a8").transformer
    outputs = run_dit(model)
    with pytest.raises(ValueError, match="cannot dequantize .* switches with the timestep group"):
        model.dequantize()
    assert torch.equal(run_dit(model), outputs)
    assert model.is_quantized and isinstance(model.hf_quantizer, DQQuantizer)


# Registration


def test_importing_registers_both_dictionaries_once():
    register()
    assert AUTO_QUANTIZER_MAPPING["diffusers_dq"] is DQQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["diffusers_dq"] is dq.DQConfig


@pytest.mark.parametrize("mapping", [AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING])
def test_a_foreign_entry_under_our_name_is_an_import_error(monkeypatch, mapping):
    monkeypatch.setitem(mapping, "diffusers_dq", object)
    with pytest.raises(ImportError, match="already knows a quantizer 'diffusers_dq'"):
        register()
