# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline

import diffusers_dq as dq
from diffusers_dq.methods import METHODS
from diffusers_dq.presets import OURS, PAPERS


@pytest.mark.parametrize("preset", OURS)
@torch.no_grad()
def test_a_preset_is_all_that_has_to_be_said(preset, dit_folder, dit_statistics, run_dit, tmp_path):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    full = run_dit(pipe.transformer)
    dq.quantize(pipe, dq.DQConfig(preset=preset, weight_bits=4), statistics=dit_statistics, progress=False)
    output = run_dit(pipe.transformer)
    assert (output - full).norm() < 0.2 * full.norm()
    pipe.save_pretrained(tmp_path)
    assert torch.equal(run_dit(DiTPipeline.from_pretrained(tmp_path).transformer), output)


def test_what_is_given_beside_a_preset_stands():
    config = dq.DQConfig(preset="balanced", group_size=64, output_correction=False, rotate=False, weight_bits=6)
    of_preset = dq.DQConfig(preset="balanced")
    assert config.recipe == replace(of_preset.recipe, group_size=64, output_correction=False)
    assert config.options == of_preset.options | {"rotate": False} and config.weight_bits == 6
    assert dq.DQConfig(**config.to_dict()) == config
    assert dq.DQConfig("htg", preset="paper").quantize_attention is True
    assert dq.DQConfig("htg", preset="paper", quantize_attention=False).quantize_attention is False


def test_every_paper_has_its_settings_and_every_setting_is_known():
    """Those without are ours, or choose among others."""
    assert set(METHODS) - set(PAPERS) <= {"composed", "auto"}
    for method in PAPERS:
        assert dq.DQConfig(method, preset="paper").method == method


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(method="htg", preset="speed"), "is a setting of 'composed', not of 'htg'"),
        (dict(preset="paper"), "needs a method with a paper"),
        (dict(method="composed", preset="paper"), "needs a method with a paper"),
        (dict(preset="best"), "preset must be one of quality, balanced, speed, paper"),
    ],
)
def test_presets_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        dq.DQConfig(**arguments)


def test_a_config_without_method_or_preset_is_refused():
    with pytest.raises(TypeError, match="needs a method, a name of dq.methods"):
        dq.DQConfig()
