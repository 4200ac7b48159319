# SPDX-License-Identifier: Apache-2.0
"""Repeating a model's forwards on kept inputs."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from support import tiny_dit

from diffusers_dq.replay import Replay, prediction, swapped
from diffusers_dq.step_policy import StepBits
from diffusers_dq.timesteps import TimestepGroups, group_of


@pytest.fixture
def model(dit_folder) -> torch.nn.Module:
    return DiTPipeline.from_pretrained(dit_folder).transformer


@torch.no_grad()
def test_outputs_are_those_of_the_model_on_each_kept_input(model, dit_statistics):
    outputs = Replay(model, dit_statistics, TimestepGroups(), [()]).outputs({})
    assert len(outputs) == len(dit_statistics.samples) == 20, "10 steps of 2 calls"
    for (timestep, output), sample in zip(outputs, dit_statistics.samples, strict=True):
        assert torch.equal(timestep, sample["timestep"].float())
        assert torch.equal(output, model(**sample).sample)
        assert not output.requires_grad


@torch.no_grad()
def test_layers_are_in_place_for_the_time_being(model, dit_statistics):
    name = "transformer_blocks.1.ff.net.2"
    linear = model.get_submodule(name)
    other = torch.nn.Linear(linear.in_features, linear.out_features)
    replay = Replay(model, dit_statistics, TimestepGroups(), [()])
    plain, changed = replay.outputs({}), replay.outputs({name: other})
    assert model.get_submodule(name) is linear
    assert not any(torch.equal(x, y) for (_, x), (_, y) in zip(plain, changed, strict=True))
    model.set_submodule(name, other)
    assert torch.equal(model(**dit_statistics.samples[0]).sample, changed[0][1])


@torch.no_grad()
def test_a_model_in_training_is_evaluated_and_goes_on_training(model, dit_statistics):
    """LabelEmbedding drops labels in training."""
    expected = Replay(model, dit_statistics, TimestepGroups(), [()]).outputs({})
    model.train()
    model.transformer_blocks[0].ff.eval()
    outputs = Replay(model, dit_statistics, TimestepGroups(), [()]).outputs({})
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(expected, outputs, strict=True))
    assert model.training and model.transformer_blocks[1].ff.training and not model.transformer_blocks[0].ff.training


def test_after_a_failure_the_model_is_as_it_was(model, dit_statistics):
    name = "transformer_blocks.0.attn1.to_q"
    linear = model.get_submodule(name)
    replay = Replay(model, dit_statistics, TimestepGroups(), [()])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        replay.outputs({name: torch.nn.Linear(3, 3)})
    assert model.get_submodule(name) is linear
    with pytest.raises(AttributeError), swapped(model, {name: torch.nn.Linear(3, 3), "nothing": linear}):
        pass
    assert model.get_submodule(name) is linear


def test_each_input_comes_with_its_timestep_group_and_bits_selected(model, dit_statistics):
    groups, partitions = TimestepGroups(2), [(250.0, 650.0), (500.0,)]
    bits = StepBits((400.0,), (8, 16))
    for timestep, _ in Replay(model, dit_statistics, groups, partitions, bits).inputs():
        assert groups.index.tolist() == [int(group_of(timestep.max(), p)) for p in partitions]
        assert groups.activation_bits == (16 if timestep.max() > 400 else 8)
    for _ in Replay(model, dit_statistics, fresh := TimestepGroups(2), partitions).inputs():
        assert fresh.activation_bits is None


def test_of_rising_timesteps_the_smallest_is_the_noisiest(model, dit_statistics):
    rising = replace(dit_statistics, timesteps=dit_statistics.timesteps.flip(0))
    replay = Replay(model, rising, groups := TimestepGroups(), [(500.0,)], StepBits((500.0,), (8, 16)))
    replay.select(torch.tensor([900.0, 100.0]))
    assert groups.index.tolist() == [0] and groups.activation_bits == 8


def test_inputs_come_in_the_models_dtype(dit_folder, dit_statistics):
    model = DiTPipeline.from_pretrained(dit_folder).transformer.bfloat16()
    outputs = Replay(model, dit_statistics, TimestepGroups(), [()]).outputs({})
    assert {output.dtype for _, output in outputs} == {torch.bfloat16}


def test_without_kept_inputs_it_says_what_to_do(dit_statistics):
    with pytest.raises(ValueError, match="calibrate with samples=32"):
        Replay(tiny_dit(), replace(dit_statistics, samples=()), TimestepGroups(), [()])


def test_a_prediction_is_the_sample_of_a_dataclass_or_the_first_of_a_tuple():
    x = torch.ones(1)
    assert prediction(Transformer2DModelOutput(sample=x)) is x
    assert prediction((x, None)) is x
