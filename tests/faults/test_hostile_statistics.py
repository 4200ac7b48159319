# SPDX-License-Identifier: Apache-2.0
"""Statistics with a sound checksum that no calibration makes: refused with the reason, and the model is as it was."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DiTTransformer2DModel

import diffusers_dq as dq
from diffusers_dq.files import read_tensors, write_tensors
from diffusers_dq.fingerprint import fingerprint_of

SITE = "transformer_blocks.1.attn1.to_q"
PLAIN = dict(method="htg", weight_bits=4)


@pytest.fixture
def model(dit_folder):
    return DiTTransformer2DModel.from_pretrained(dit_folder, subfolder="transformer")


def nan(name):
    def change(header, tensors):
        tensors[name] = tensors[name] * torch.nan

    return change


def narrow(header, tensors):
    for key in ("min", "max", "tokens", "sums"):
        tensors[f"{SITE}/{key}"] = tensors[f"{SITE}/{key}"][..., :8].contiguous()
    tensors[f"{SITE}/products"] = tensors[f"{SITE}/products"][:8, :8].contiguous()


def sample_nan(header, tensors):
    name = max((name for name in tensors if name.startswith("samples/")), key=lambda name: tensors[name].numel())
    tensors[name] = tensors[name] * torch.nan


CHANGES = {
    "tokens": (nan(f"{SITE}/tokens"), PLAIN, f"tokens sampled of {SITE} hold NaN"),
    "moments": (nan(f"{SITE}/products"), dict(method="rtn", weight_bits=4, rounding="gptq"), "finite"),
    "samples": (sample_nan, PLAIN | {"noise_correction": True}, "noise_correction.* came out as NaN"),
    "no timestep": (
        lambda header, tensors: header["samples"][0]["dict"].pop("timestep"),
        PLAIN | {"noise_correction": True},
        "a sample has no timestep, it has .*class_labels",
    ),
    "one timestep ten times": (
        lambda header, tensors: tensors["timesteps"].fill_(500.0),
        PLAIN,
        "timesteps neither fall nor rise",
    ),
    "shuffled timesteps": (
        lambda header, tensors: tensors.update(timesteps=tensors["timesteps"].roll(3)),
        PLAIN,
        "timesteps neither fall nor rise",
    ),
    "another width": (narrow, PLAIN, f"the statistics of {SITE} are of 8 channels, .* reads 32"),
    "more calls than there are": (
        lambda header, tensors: header["about"].update(calls_done=10**9),
        PLAIN,
        "1000000000 calls are done of 2",
    ),
    "fewer than none": (lambda header, tensors: header["about"].update(calls_done=-1), PLAIN, "-1 calls are done"),
}


@pytest.mark.parametrize(("change", "config", "message"), CHANGES.values(), ids=CHANGES)
def test_what_no_calibration_makes_is_refused(model, dit_statistics_path, tmp_path, run_dit, change, config, message):
    header, tensors = read_tensors(dit_statistics_path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(header, tensors)
    write_tensors(tmp_path / "s", tensors, header)
    before = run_dit(model)
    with pytest.raises(ValueError, match=message):
        dq.quantize(model, dq.DQConfig(**config), statistics=tmp_path / "s", progress=False)
    assert torch.equal(run_dit(model), before) and not getattr(model, "is_quantized", False)


def test_biases_are_part_of_what_a_checkpoint_is_known_by(model, dit_statistics):
    dit_statistics.check_model(model)
    dit_statistics.check_model(copy.deepcopy(model).bfloat16())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3)
    with pytest.raises(ValueError, match="with other weights than this one's"):
        dit_statistics.check_model(model)


def test_statistics_of_earlier_versions_knew_matrices_only(model, dit_statistics):
    matrices = sum(parameter.ndim >= 2 for parameter in model.parameters())
    assert len(fingerprint_of(model)) > 4 * matrices
    earlier = replace(dit_statistics, fingerprint=dit_statistics.fingerprint[: 4 * matrices])
    earlier.check_model(model)
    with torch.no_grad():
        model.proj_out_2.weight.mul_(1.5)
    with pytest.raises(ValueError, match="with other weights than this one's"):
        earlier.check_model(model)
