# SPDX-License-Identifier: Apache-2.0
"""Changes that norms with a shift or a scale alone can carry, and linears that are left by default: exact too."""

import pytest
import torch
from support import rebuilt_with_chains
from tiny_models import MODELS, TinyModel
from tiny_models.fp64 import all_in_fp64

from diffusers_dq.specs import SPECS, ModulatedNorm, spec_of
from diffusers_dq.transforms import Chain, Scale, Shift

DESCRIBED = {name: tiny for name, tiny in MODELS.items() if SPECS.get(tiny.cls) is not None}


def _halved(tiny: TinyModel) -> bool:
    producers = [group.producer for group in spec_of(tiny.build()).groups]
    return any(None in pair for norm in producers if isinstance(norm, ModulatedNorm) for pair in norm.chunks)


def _chain(kinds: tuple[type, ...], channels: int, boundaries: tuple[float, ...], generator: torch.Generator) -> Chain:
    shift = torch.randn(3, channels, generator=generator, dtype=torch.float64)
    scale = torch.rand(channels, generator=generator, dtype=torch.float64) * 4 + 0.1
    return Chain(tuple(kind(shift if kind is Shift else scale) for kind in kinds), boundaries)


def _boundaries(tiny: TinyModel) -> tuple[float, ...]:
    ordered = sorted(tiny.timesteps)
    return tuple((low + high) / 2 for low, high in zip(ordered, ordered[1:], strict=False))


def _assert_same(tiny: TinyModel, model: torch.nn.Module, twin: torch.nn.Module) -> None:
    for timestep in tiny.timesteps:
        expected = tiny.run(model, timestep)
        # fp64 keeps 16 digits; a few blocks of products of small widths lose a few
        assert (tiny.run(twin, timestep) - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("name", [name for name, tiny in DESCRIBED.items() if _halved(tiny)])
@pytest.mark.parametrize("kind", [Shift, Scale])
def test_a_shift_or_a_scale_alone_is_carried(name, kind):
    tiny = DESCRIBED[name]
    model = tiny.build(torch.float64)
    spec, generator = spec_of(model), torch.Generator().manual_seed(3)
    chains = {
        group.name: _chain((kind,), model.get_submodule(group.name).in_features, _boundaries(tiny), generator)
        for group in spec.groups
        if not spec.weight_only.issuperset(group.linears)
    }
    with all_in_fp64():
        twin = rebuilt_with_chains(model, chains)
        _assert_same(tiny, model, twin)
    norms = [group for group in spec.groups if isinstance(group.producer, ModulatedNorm)]
    carried = {group.name for group in norms if twin.get_submodule(group.name).layout.input_carried}
    assert carried == {group.name for group in norms if group.producer.can_carry(chains[group.name])}


@pytest.mark.parametrize("tiny", DESCRIBED.values(), ids=DESCRIBED)
def test_linears_that_are_left_by_default_are_described_rightly(tiny):
    model = tiny.build(torch.float64)
    spec, generator = spec_of(model), torch.Generator().manual_seed(3)
    chains = {
        group.name: _chain((Shift, Scale), model.get_submodule(group.name).in_features, _boundaries(tiny), generator)
        for group in spec.groups
        if not spec.weight_only.issuperset(group.linears)
    }
    with all_in_fp64():
        _assert_same(tiny, model, rebuilt_with_chains(model, chains, modules_to_not_convert=[]))
