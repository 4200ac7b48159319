# SPDX-License-Identifier: Apache-2.0
"""What a spec says depends on the prompt alone: neither another step nor another picture changes it."""

import pytest
import torch
from tiny_models import MODELS, TinyModel
from torch import Tensor, nn

from diffusers_dq.specs import SPECS, TextProjections, spec_of


def _text(tiny: TinyModel) -> TextProjections | None:
    return None if SPECS.get(tiny.cls) is None else spec_of(tiny.build()).text


def _read(model: nn.Module, text: TextProjections, inputs: dict) -> list[Tensor]:
    """What the projections are given in one forward."""
    seen: list[Tensor] = []
    linears = [model.get_submodule(name) for name in text.linears]
    handles = [linear.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for linear in linears]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", [name for name, tiny in MODELS.items() if _text(tiny) is not None])
def test_text_projections_read_what_comes_of_the_prompt_alone(name):
    tiny = MODELS[name]
    model = tiny.build()
    text = spec_of(model).text
    first, other = (
        dict(tiny.inputs(timestep, torch.Generator().manual_seed(seed)))
        for timestep, seed in ((tiny.timesteps[0], 2), (tiny.timesteps[2], 5))
    )
    same_prompt = other | {argument: first[argument] for argument in text.arguments if argument in first}
    expected, again = _read(model, text, first), _read(model, text, same_prompt)
    assert len(expected) == len(text.linears)
    assert all(torch.equal(x, y) for x, y in zip(expected, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(expected, _read(model, text, other), strict=True))
