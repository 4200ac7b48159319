# SPDX-License-Identifier: Apache-2.0
"""TFMQ-DM: the temporal layers' ranges by step, and their turn in learning."""

import pytest
import torch
from diffusers import DiTPipeline

import diffusers_dq as dq
from diffusers_dq import affine
from diffusers_dq.conversion import Conversion
from diffusers_dq.reconstruction import units_of
from diffusers_dq.scheme import QuantScheme

TEMPORAL = [f"transformer_blocks.{i}.norm1.linear" for i in range(2)]
STATIC = QuantScheme(bits=8, granularity="tensor", symmetric=False)


def conversion(folder, statistics, **config) -> Conversion:
    model = DiTPipeline.from_pretrained(folder).transformer
    return Conversion(model, dq.DQConfig("tfmq", **config), statistics, torch.float32)


@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_inputs_of_temporal_layers_have_a_range_a_step(search, dit_folder, dit_statistics):
    plan = conversion(dit_folder, dit_statistics, search=search).plan
    ascending = dit_statistics.timesteps.argsort()
    for name in TEMPORAL:
        found, site = plan.linears[name].input_range, dit_statistics.input_of(name)
        assert found.scale.shape == (10,) and len(found.boundaries) == 9
        for group, step in enumerate(ascending.tolist()):
            low, high = site.minimum[step].amin()[None], site.maximum[step].amax()[None]
            if search == "minmax":
                scale, zero = affine.affine_parameters(low, high, STATIC)
            else:
                scale, zero = affine.search_range(site.tokens[step].float().reshape(1, -1), low, high, STATIC)
            assert found.scale[group] == scale and found.zero_point[group] == zero
    others = [linear.input_range for name, linear in plan.linears.items() if name not in TEMPORAL]
    assert len(others) == 12 and all(len(found.scale) == 1 for found in others)


def test_temporal_layers_are_learned_first_and_each_alone(dit_folder, dit_statistics):
    plan = conversion(dit_folder, dit_statistics).plan
    assert plan.apart == set(TEMPORAL)
    units = units_of(DiTPipeline.from_pretrained(dit_folder).transformer, list(plan.linears), "block", plan.apart)
    assert list(units) == [*TEMPORAL, "transformer_blocks.0", "transformer_blocks.1"]
    assert all(units[name] == [name] for name in TEMPORAL)
    assert not set(TEMPORAL) & {name for unit in list(units)[2:] for name in units[unit]}


@torch.no_grad()
def test_each_step_runs_with_its_own_range(dit_folder, dit_statistics):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    config = dq.DQConfig("tfmq", rounding="nearest")
    dq.quantize(pipe, config, statistics=dit_statistics, progress=False)
    layer = pipe.transformer.get_submodule(TEMPORAL[0])
    assert layer.layout.rounds_input and layer.layout.range_groups == 10
    scales = []
    for t in sorted(dit_statistics.timesteps.int().tolist()):
        given = dict(hidden_states=torch.ones(1, 4, 8, 8), class_labels=torch.tensor([1]))
        pipe.transformer(timestep=torch.tensor([t]), **given)
        scales.append(layer.range_row()[0])
    assert torch.equal(torch.stack(scales), layer.input_scale)
    assert len(layer.input_scale.unique()) > 1


def test_it_is_q_diffusion_but_for_the_temporal_layers(dit_folder, dit_statistics):
    assert dq.DQConfig("tfmq").recipe == dq.DQConfig("qdiffusion").recipe
    ours = conversion(dit_folder, dit_statistics).plan.linears
    model = DiTPipeline.from_pretrained(dit_folder).transformer
    theirs = Conversion(model, dq.DQConfig("qdiffusion"), dit_statistics, torch.float32).plan
    assert not theirs.apart
    for name, plan in theirs.linears.items():
        if name in TEMPORAL:
            assert plan.scheme is None and ours[name].scheme is not None
        else:
            assert plan.input_range.scale == ours[name].input_range.scale
