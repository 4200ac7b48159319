# SPDX-License-Identifier: Apache-2.0
"""Every spec: any change of basis of any of its groups is exact in fp64, and what it says of the model is true."""

import pytest
import torch
from support import rebuilt_with_chains
from tiny_models import MODELS, TinyModel
from tiny_models.fp64 import all_in_fp64
from torch import nn

import diffusers_dq as dq
from diffusers_dq.denoise import TimestepArgument
from diffusers_dq.modulation import Modulation
from diffusers_dq.planning import kept_in_full_precision
from diffusers_dq.replay import blocks_of
from diffusers_dq.specs import SPECS, spec_of
from diffusers_dq.transforms import Chain, Scale, Shift

DESCRIBED = {name: tiny for name, tiny in MODELS.items() if SPECS.get(tiny.cls) is not None}


def test_every_spec_has_a_tiny_model():
    assert set(SPECS) == {tiny.cls for tiny in DESCRIBED.values()}


@pytest.fixture(params=DESCRIBED.values(), ids=DESCRIBED)
def tiny(request) -> TinyModel:
    return request.param


def _linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def test_any_chain_on_every_group_is_exact(tiny):
    model = tiny.build(torch.float64)
    spec, generator = spec_of(model), torch.Generator().manual_seed(3)
    ordered = sorted(tiny.timesteps)
    boundaries = tuple((low + high) / 2 for low, high in zip(ordered, ordered[1:], strict=False))
    chains = {}
    for group in spec.groups:
        channels = model.get_submodule(group.name).in_features
        if spec.weight_only.issuperset(group.linears):
            continue
        shift = torch.randn(3, channels, generator=generator, dtype=torch.float64)
        scale = torch.rand(channels, generator=generator, dtype=torch.float64) * 4 + 0.1
        chains[group.name] = Chain((Shift(shift), Scale(scale)), boundaries)
    with all_in_fp64():
        twin = rebuilt_with_chains(model, chains)
        for timestep in tiny.timesteps:
            expected = tiny.run(model, timestep)
            assert expected.dtype == torch.float64 and expected.std() > 0
            # fp64 keeps 16 digits; a few blocks of products of small widths lose a few
            assert (tiny.run(twin, timestep) - expected).norm() <= 1e-10 * expected.norm()


def test_exactness_depends_on_the_tables(tiny):
    model = tiny.build(torch.float64)
    spec = spec_of(model)
    group = next(group for group in spec.groups if not spec.weight_only.issuperset(group.linears))
    channels = model.get_submodule(group.name).in_features
    shift = torch.stack([torch.zeros(channels), torch.ones(channels)]).double()
    middle = sum(sorted(tiny.timesteps)[:2]) / 2
    with all_in_fp64():
        twin = rebuilt_with_chains(model, {group.name: Chain((Shift(shift),), (middle,))})
        tables = [m.offset for m in twin.modules() if isinstance(m, Modulation)]
        tables += [m.bias_groups for m in twin.modules() if getattr(m, "bias_groups", None) is not None]
        for table in tables:
            table[-1] += 1.0
        expected = tiny.run(model, max(tiny.timesteps))
        assert (tiny.run(twin, max(tiny.timesteps)) - expected).norm() > 1e-4 * expected.norm()


def test_every_linear_is_in_one_group_or_left_by_name(tiny):
    model = tiny.build()
    spec = spec_of(model)
    grouped = [linear for group in spec.groups for linear in group.linears]
    assert len(grouped) == len(set(grouped)) and set(grouped) <= set(_linears(model))
    kept = kept_in_full_precision(model, spec, dq.DQConfig("rtn"))  # the planner's rule, not ours
    forgotten = {name: reason for name, reason in kept.items() if "in no group" in reason}
    assert not forgotten
    for part in spec.not_converted:
        reason = f"{part!r} is in the architecture's modules_to_not_convert"
        assert reason in kept.values(), f"{part} keeps no linear in full precision that no part before it keeps"


def test_it_says_where_the_timestep_is(tiny):
    timestep = spec_of(tiny.build()).timestep
    assert timestep is not None and timestep.argument == TimestepArgument.of(tiny.build()).name
    low, high = sorted((timestep.noisiest, timestep.cleanest))
    assert all(low <= t <= high for t in tiny.timesteps)
    assert (tiny.timesteps[0] > tiny.timesteps[-1]) == timestep.descending


def test_groups_are_those_that_calibration_would_discover(tiny):
    """Linears given the same tensor in one block are in one group, and all of a group are given its values."""
    model = tiny.build()
    seen: dict[str, tuple[int, str]] = {}
    values: dict[str, torch.Tensor] = {}
    blocks = list(blocks_of(model))
    held = []  # so that no address is used twice

    def watch(name):
        def hook(module, args):
            held.append(args[0])
            block = next((block for block in blocks if name.startswith(f"{block}.")), "")
            seen[name], values[name] = (id(args[0]), block), args[0].clone()

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(watch(n)) for n in _linears(model)]
    tiny.run(model)
    for handle in handles:
        handle.remove()
    of = {name: group.linears for group in spec_of(model).groups for name in group.linears}
    known = [name for name in of if name in seen]
    assert known
    for name in known:
        together = {other for other in known if seen[other] == seen[name]}
        assert together <= set(of[name]), name
        for other in set(of[name]) & set(known) - together:
            assert seen[other][1] == seen[name][1] and torch.equal(values[other], values[name]), (name, other)


def test_sixteen_bits_change_nothing_and_eight_little(tiny):
    model = tiny.build()
    expected = tiny.run(model)
    dq.quantize(model, dq.DQConfig("quarot", weight_bits=16, activation_bits=16), progress=False)
    # fp32, rotated and back: 1e-5 is 80 of its units in the last place
    assert (tiny.run(model) - expected).norm() <= 1e-5 * expected.norm()
    model = tiny.build()
    report = dq.quantize(model, dq.DQConfig("rtn"), progress=False)
    assert report.quantized
    error = (tiny.run(model) - expected).norm() / expected.norm()
    # half a percent a linear at 8 bits, through a few blocks of random weights; 4 bits are at ten times that
    assert 0 < error <= 0.1
