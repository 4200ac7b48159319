# SPDX-License-Identifier: Apache-2.0
"""Quantized pipelines of every kind, and what is in their folders."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

RTN = {"method": "rtn"}
HTG = {"method": "htg", "groups": 3, "search": "minmax"}
QDIT = {"method": "qdit", "group_size": 32}
VARIANTS = {
    "rtn-w8a8": RTN,
    "rtn-w4a8": RTN | {"weight_bits": 4},
    "rtn-w4a16": RTN | {"weight_bits": 4, "activation_bits": 16},
    "rtn-w16a16": RTN | {"weight_bits": 16, "activation_bits": 16},
    "rtn-w6a8": RTN | {"weight_bits": 6},
    "rtn-w6a16": RTN | {"weight_bits": 6, "activation_bits": 16},
    "htg-w6a8": HTG | {"weight_bits": 6},
    "htg-w8a8": HTG,
    "htg-w4a8": HTG | {"weight_bits": 4},
    "htg-w16a16": HTG | {"weight_bits": 16, "activation_bits": 16},
    "htg-attention": HTG | {"quantize_attention": True},
    "quarot-w4a8": {"method": "quarot", "weight_bits": 4},
    "quarot-static": {"method": "quarot", "dynamic": False},
    "quarot-w4a16": {"method": "quarot", "weight_bits": 4, "activation_bits": 16},
    "qdit-w4a8": {"method": "qdit", "weight_bits": 4, "group_size": 32},
    "qdit-w8a8": {"method": "qdit", "group_size": 64},
    "qdit-w4a8-token": {
        "method": "qdit",
        "weight_bits": 4,
        "activations": "token",
        "symmetric": True,
        "group_size": 32,
    },
    "qdit-w4a16": {"method": "qdit", "weight_bits": 4, "activation_bits": 16, "group_size": 32},
    "viditq-w4a8": {"method": "viditq", "weight_bits": 4},
    "qdit-gptq": QDIT | {"weight_bits": 4, "rounding": "gptq"},
    "htg-gptq": HTG | {"weight_bits": 4, "rounding": "gptq"},
    "ptq4dit-w4a8": {"method": "ptq4dit", "weight_bits": 4},
    "smoothquant-online": {"method": "smoothquant", "online": True},
    "htg-per-layer": HTG | {"scope": "layer", "ranges": "group", "online": True},
}
LINEAR = "transformer_blocks.1.attn1.to_q"


def generate(pipe):
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe([1, 2], generator=seed, num_inference_steps=4, output_type="np").images)


def load(folder, **arguments):
    return DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", **arguments)


def weights_file(folder):
    return Path(folder) / "transformer" / "diffusion_pytorch_model.safetensors"


def saved_config(folder):
    return json.loads((Path(folder) / "transformer" / "config.json").read_text())["quantization_config"]


def edit_weights(folder, change):
    """Apply `change` to the dict of tensors in the file."""
    tensors = load_file(weights_file(folder))
    change(tensors)
    save_file(tensors, weights_file(folder), metadata={"format": "pt"})


def edit_config(folder, change):
    """Apply `change` to the quantization_config in config.json."""
    path = Path(folder) / "transformer" / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def transformer_copied(folder, target):
    shutil.copytree(Path(folder) / "transformer", target / "transformer")
    return target
