# SPDX-License-Identifier: Apache-2.0
"""Names, dtypes and shapes in the files of a saved model."""

import torch
from safetensors.torch import load_file
from saved_models import LINEAR, load, saved_config, weights_file


def test_names_dtypes_and_shapes_in_the_file(saved):
    tensors = load_file(weights_file(saved["htg-w4a8"][0]))
    found = {
        name.removeprefix("transformer_blocks.1."): (tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items()
        if name.startswith(("transformer_blocks.1.attn1.to_q", "transformer_blocks.1.ff.net.2", "timestep"))
    }
    assert found == {
        "attn1.to_q.weight": (torch.uint8, (32, 16)),
        "attn1.to_q.weight_scale": (torch.float32, (32,)),
        "attn1.to_q.bias_groups": (torch.float32, (3, 32)),
        "attn1.to_q.input_scale": (torch.float32, (1,)),
        "attn1.to_q.input_zero_point": (torch.int32, (1,)),
        "ff.net.2.weight": (torch.uint8, (32, 64)),
        "ff.net.2.weight_scale": (torch.float32, (32,)),
        "ff.net.2.bias_groups": (torch.float32, (1, 32)),
        "ff.net.2.input_scale": (torch.float32, (1,)),
        "ff.net.2.input_zero_point": (torch.int32, (1,)),
        "timestep_boundaries": (torch.float32, (2, 2)),
    }


def test_names_dtypes_and_shapes_in_the_file_without_calibration(saved):
    tensors = load_file(weights_file(saved["rtn-w8a8"][0]))
    found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items() if name.startswith(LINEAR)}
    assert found == {
        f"{LINEAR}.weight": (torch.int8, (32, 32)),
        f"{LINEAR}.weight_scale": (torch.float32, (32,)),
        f"{LINEAR}.bias": (torch.float32, (32,)),
    }
    assert "timestep_boundaries" not in tensors


def test_names_of_online_transforms_in_the_file(saved):
    tensors = load_file(weights_file(saved["htg-per-layer"][0]))
    assert tensors["transformer_blocks.1.ff.net.2.weight"].dtype == torch.int8
    assert tensors["transformer_blocks.1.ff.net.2.input_shift"].shape == (3, 128)
    assert tensors["transformer_blocks.1.ff.net.2.input_inv_smooth"].shape == (128,)
    assert tensors["transformer_blocks.1.ff.net.2.input_scale"].shape == (3,)


def test_config_json_says_what_was_done(saved):
    config = saved_config(saved["htg-w4a8"][0])
    expected = {"quant_method": "diffusers_dq", "method": "htg", "weight_bits": 4, "groups": 3, "format_version": 1}
    assert expected.items() <= config.items()
    layout = {"weight_bits": 4, "activation_bits": 8, "input_rounding": "static"}
    layout |= {"bias_groups": 3, "range_groups": 1, "partition": 1, "input_carried": True}
    assert config["result"]["linears"][LINEAR] == layout


def test_equal_embedders_are_stored_once_and_shared_after_loading(saved, dit_folder):
    folder, _, _ = saved["rtn-w4a8"]
    assert not [name for name in load_file(weights_file(folder)) if name.startswith("transformer_blocks.1.norm1.emb")]
    first, second = (block.norm1.emb for block in load(folder).transformer_blocks)
    assert first is second


def test_a_w4_linear_takes_half_a_byte_a_weight(saved, dit_folder):
    full, quantized = load_file(weights_file(dit_folder)), load_file(weights_file(saved["rtn-w4a8"][0]))
    for name in saved_config(saved["rtn-w4a8"][0])["result"]["linears"]:
        assert quantized[f"{name}.weight"].nbytes * 2 == full[f"{name}.weight"].numel()


def test_a_w6_linear_takes_three_quarters_of_a_byte_a_weight_in_the_file_and_one_in_memory(saved, dit_folder):
    folder, _, _ = saved["htg-w6a8"]
    full, quantized, model = load_file(weights_file(dit_folder)), load_file(weights_file(folder)), load(folder)
    for name in saved_config(folder)["result"]["linears"]:
        assert quantized[f"{name}.weight"].nbytes * 4 == full[f"{name}.weight"].numel() * 3
        weight = model.get_submodule(name).weight
        assert weight.dtype == torch.int8 and -32 <= int(weight.min()) < -8 and 7 < int(weight.max()) <= 31
