# SPDX-License-Identifier: Apache-2.0
"""The models of the step benchmark, cut down, and what is counted in them."""

import pytest
import torch

from diffusers_dq.benchmark.models import CASES, build, case_of, inputs
from diffusers_dq.benchmark.roofline import linear_calls, weight_bytes

TINY = dict(layers=1, heads=2, head_dim=32, tokens=16, batch=1, text_width=16)


def tiny(name):
    return case_of(name).changed(**TINY, text=4 if case_of(name).text else None)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_each_model_takes_its_inputs_and_has_no_zero_weight(name):
    case = tiny(name)
    model = build(case, "cpu")
    assert all(bool(p.any()) for p in model.parameters() if p.dim() > 1)
    arguments = inputs(case, "cpu", torch.float32)
    output = model(**arguments).sample
    assert output.isfinite().all()
    assert len(output) == case.samples == (2 if case.cfg else 1)
    again = inputs(case, "cpu", torch.float32)
    assert torch.equal(arguments["hidden_states"], again["hidden_states"]), "the same for every contestant"


def test_the_published_sizes():
    with torch.device("meta"):
        from diffusers_dq.benchmark import models

        counted = {name: models._FAMILIES[case.family][0](case).num_parameters() for name, case in CASES.items()}
    millions = {name: round(count / 1e6) for name, count in counted.items()}
    assert 600 < millions["pixart"] < 620, "PixArt-Sigma has 0.6 B"
    assert 11_800 < millions["flux"] < 12_000, "FLUX.1 has 12 B"
    assert millions["dit-512"] > 670, "DiT-XL/2 has 675 M, and diffusers repeats its embedders in each block"


def test_a_size_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="tokens must be a square number.* got 8"):
        case_of("dit-256").changed(tokens=8)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        case_of("dit-256").changed(layers=0)
    with pytest.raises(ValueError, match="no benchmark model 'sdxl'; known: dit-512"):
        case_of("sdxl")


@torch.no_grad()
def test_linears_are_counted_by_the_rows_they_see():
    case = tiny("dit-256")
    model = build(case, "cpu")
    calls, output = linear_calls(model, lambda: model(**inputs(case, "cpu", torch.float32)).sample)
    by_name = {call.name: call for call in calls}
    first = by_name["transformer_blocks.0.ff.net.0.proj"]
    assert (first.m, first.n, first.k) == (2 * 16, 4 * 64, 64)
    assert first.operations == 2 * 32 * 256 * 64
    assert by_name["transformer_blocks.0.norm1.linear"].m == 2
    assert len(output) == 2
    assert not any(module._forward_pre_hooks for module in model.modules()), "no hook stays"


def test_bytes_count_a_shared_tensor_once_and_a_subclass_by_what_it_holds():
    linear = torch.nn.Linear(4, 2, bias=False)
    assert weight_bytes(torch.nn.Sequential(linear, linear)) == 2 * 4 * 4

    class Held(torch.nn.Module):
        def parameters(self, recurse=True):
            yield Wrapped()

    class Wrapped:
        nbytes = 1000
        inner = torch.zeros(3, dtype=torch.int8)

        def __tensor_flatten__(self):
            return ["inner"], None

    assert weight_bytes(Held()) == 3
