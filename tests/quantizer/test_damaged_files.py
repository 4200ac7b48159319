# SPDX-License-Identifier: Apache-2.0
"""Files that are damaged, of another model or of a newer version: each is refused with its reason."""

import json
import re

import pytest
import torch
from safetensors import SafetensorError
from saved_models import LINEAR, edit_config, edit_weights, load, transformer_copied, weights_file


def test_a_missing_tensor_is_an_error(damaged):
    edit_weights(damaged, lambda tensors: tensors.pop(f"{LINEAR}.weight_scale"))
    with pytest.raises(ValueError, match=rf"1 missing \({LINEAR}.weight_scale\)"):
        load(damaged)


def test_a_missing_tensor_of_an_unquantized_layer_is_an_error(damaged):
    edit_weights(damaged, lambda tensors: tensors.pop("proj_out_2.weight"))
    with pytest.raises(ValueError, match=r"1 missing \(proj_out_2.weight\)"):
        load(damaged)


def test_an_extra_tensor_is_an_error(damaged):
    edit_weights(damaged, lambda tensors: tensors.update(surplus=torch.zeros(1)))
    with pytest.raises(ValueError, match=r"1 extra \(surplus\)"):
        load(damaged)


@pytest.mark.parametrize("name", ["weight", "weight_scale", "bias_groups", "input_scale"])
def test_a_tensor_of_another_shape_is_an_error(damaged, name):
    name = f"{LINEAR}.{name}"
    edit_weights(damaged, lambda tensors: tensors.update({name: torch.cat([tensors[name], tensors[name]])}))
    with pytest.raises(ValueError, match=rf"{name} has shape .* in the file, config.json says"):
        load(damaged)


@pytest.mark.parametrize(
    "change",
    [lambda weight: torch.cat([weight, weight]), lambda weight: weight[:, :-1], lambda weight: weight.to(torch.int8)],
    ids=["twice the rows", "a column less", "another dtype"],
)
def test_a_packed_w6_weight_that_does_not_fit_is_an_error(saved, tmp_path, change):
    folder = transformer_copied(saved["htg-w6a8"][0], tmp_path)
    name = f"{LINEAR}.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))
    with pytest.raises(ValueError, match=re.escape(name)):
        load(folder)


def test_a_boundary_table_of_another_shape_is_an_error(damaged):
    edit_weights(damaged, lambda tensors: tensors.update(timestep_boundaries=torch.zeros(3, 3)))
    with pytest.raises(ValueError, match=r"timestep_boundaries has shape \(3, 3\) in the file, .* \(2, 2\)"):
        load(damaged)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (f"{LINEAR}.weight", torch.int8),
        (f"{LINEAR}.weight_scale", torch.bfloat16),
        (f"{LINEAR}.input_zero_point", torch.int64),
        ("timestep_boundaries", torch.int32),
        ("pos_embed.proj.bias", torch.int8),
        ("proj_out_2.weight", torch.int8),
    ],
)
def test_a_tensor_of_another_dtype_is_an_error(damaged, name, dtype):
    edit_weights(damaged, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ValueError, match=rf"{name} is {dtype} in the file, expected"):
        load(damaged)


@pytest.mark.parametrize("name", ["weight_scale", "bias_groups", "input_scale"])
def test_a_table_that_is_not_finite_is_an_error(damaged, name):
    """Integers would hide it: what NaN is rounded to looks like any other number."""
    name = f"{LINEAR}.{name}"
    edit_weights(damaged, lambda tensors: tensors[name].view(-1)[0].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"{name} holds NaN or infinite values"):
        load(damaged)


def test_a_truncated_file_is_an_error(damaged):
    content = weights_file(damaged).read_bytes()
    weights_file(damaged).write_bytes(content[:-100])
    with pytest.raises((OSError, SafetensorError)):
        load(damaged)


def test_a_newer_format_is_an_error(damaged):
    edit_config(damaged, lambda config: config.update(format_version=99))
    with pytest.raises(ValueError, match="saved in format 99, this diffusers_dq reads up to 1: upgrade"):
        load(damaged)


NONSENSE = {
    "result is a list": lambda config: config.update(result=[1, 2]),
    "result is empty": lambda config: config.update(result={}),
    "format is a word": lambda config: config.update(format_version="one"),
    "no partitions": lambda config: config["result"].pop("partitions"),
    "half a shape": lambda config: config["result"].update(partitions=[1]),
    "no such dtype": lambda config: config["result"].update(dtype="float99"),
    "unknown key": lambda config: config["result"].update(unknown=1),
    "bits are a word": lambda config: config["result"]["linears"][LINEAR].update(weight_bits="four"),
    "bits out of range": lambda config: config["result"]["linears"][LINEAR].update(weight_bits=3),
    "negative count": lambda config: config["result"]["linears"][LINEAR].update(bias_groups=-1),
    "no such partition": lambda config: config["result"]["linears"][LINEAR].update(partition=5),
    "static without a range": lambda config: config["result"]["linears"][LINEAR].update(range_groups=0),
    "no such rotation": lambda config: config["result"]["linears"][LINEAR].update(rotation_order=3),
    "group size that does not fit": lambda config: config["result"]["linears"][LINEAR].update(group_size=24),
    "a word for a flag": lambda config: config["result"]["linears"][LINEAR].update(smooth="no"),
    "zero points of 8-bit weights": lambda config: config["result"]["linears"][LINEAR].update(
        weight_bits=8, group_size=32, weight_zero_points=True
    ),
    "unknown layout key": lambda config: config["result"]["linears"][LINEAR].update(color="red"),
    "no layout": lambda config: config["result"]["linears"].update({LINEAR: None}),
    "no such linear": lambda config: config["result"]["linears"].update(
        {"no.such": {"weight_bits": 8, "activation_bits": 8}}
    ),
    "no such attention": lambda config: config["result"].update(attention=["no.such"]),
    "no such module": lambda config: config["result"].update(tied={"no.such": "pos_embed"}),
}


@pytest.mark.parametrize("change", NONSENSE.values(), ids=NONSENSE)
def test_a_config_json_that_makes_no_sense_is_an_error(damaged, change):
    edit_config(damaged, change)
    with pytest.raises(ValueError, match="config.json"):
        load(damaged)


def test_a_config_json_of_another_model_is_an_error(damaged):
    path = damaged / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 1}))
    with pytest.raises(ValueError, match="names transformer_blocks.1.*, which is no Linear of this DiT"):
        load(damaged)
