# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C on any line of `quantize`: the model is wholly as before or wholly quantized, and quantizes afterwards.

The 20 lines a method are the same every time; DQ_FUZZ_CASES=10000, the nightly number, draws 400 others.
"""

import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel

import diffusers_dq as dq
from diffusers_dq import guards

CASES = int(os.environ.get("DQ_FUZZ_CASES", "500"))
POINTS = max(1, CASES // 25)
PACKAGE = str(Path(dq.__file__).parent) + os.sep
CONFIGS = {
    "rtn": dict(method="rtn", weight_bits=4),
    "htg": dict(method="htg", groups=3, guard_steps=(1, 1), noise_correction=True),
    "ptq4dit": dict(method="ptq4dit", weight_bits=4, quantize_attention=True),
}


def traced(function, on_line):
    """Call it; `on_line((file, line))` before each line of the package."""

    def local(frame, event, argument):
        if event == "line":
            on_line((frame.f_code.co_filename, frame.f_lineno))
        return local

    tracing = sys.gettrace()
    sys.settrace(lambda frame, event, argument: local if frame.f_code.co_filename.startswith(PACKAGE) else None)
    try:
        return function()
    finally:
        sys.settrace(tracing)


def interrupting(place, times):
    """An `on_line` that raises KeyboardInterrupt when the place is reached for the `times`-th time, then never."""
    seen = [0]

    def on_line(here):
        seen[0] += here == place
        if seen[0] == times and here == place:
            raise KeyboardInterrupt(f"{Path(place[0]).name}:{place[1]}")

    return on_line


def content(value):
    """What it is made of, in order; what is in no container stands for itself."""
    if isinstance(value, dict):
        return [(key, id(item)) for key, item in value.items()]
    return [id(item) for item in value] if isinstance(value, (list, tuple, set)) else id(value)


def state(model):
    """Every object that the model is made of: class and attributes of each module and of its quantizer, containers of
    hooks and tensors with what is in them, and where the values of tensors are."""
    owners = dict(model.named_modules()) | {"quantizer": getattr(model, "hf_quantizer", None)}
    return {
        "modules": [(name, id(owner), type(owner)) for name, owner in owners.items()],
        "attributes": {
            name: [(key, id(value), content(value)) for key, value in vars(owner).items()]
            for name, owner in owners.items()
            if owner is not None
        },
        "values": {name: tensor.data_ptr() for name, tensor in tensors(model).items()},
    }


def tensors(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


def clones(model):
    return {name: tensor.clone() for name, tensor in tensors(model).items()}


def assert_equal(tensors, others):
    assert tensors.keys() == others.keys()
    assert all(tensors[name].dtype == others[name].dtype for name in tensors)
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.fixture(params=CONFIGS)
def build(request, dit_folder, dit_statistics):
    """(a function: a model to quantize, a function that does it).

    HTG's has been loaded prepared, so that its quantizer is to be left as it was too."""
    config = dq.DQConfig(**CONFIGS[request.param])
    prepared = {"quantization_config": config} if request.param == "htg" else {}

    def load():
        return DiTTransformer2DModel.from_pretrained(dit_folder, subfolder="transformer", **prepared)

    return load, lambda model: dq.quantize(model, config, statistics=dit_statistics, progress=False)


def places_in(load, quantize):
    """Every line of the package that quantizing reaches, and how often, once caches are filled."""
    quantize(load())
    model, reached = load(), Counter()
    traced(lambda: quantize(model), lambda place: reached.update([place]))
    return reached


def test_ctrl_c_on_any_line_leaves_the_model_as_it_was_or_quantized(build, run_dit):
    load, quantize = build
    reached = places_in(load, quantize)
    places = random.Random(0 if CASES <= 500 else None).sample(sorted(reached), min(POINTS, len(reached)))
    finished = load()
    quantize(finished)
    quantized, outputs_quantized = clones(finished), run_dit(finished)

    model = load()
    before, values, outputs = state(model), clones(model), run_dit(model)
    for i, place in enumerate(places):
        times = random.Random(i).randint(1, reached[place])
        where = f"{place[0]}:{place[1]}, the {times}. of {reached[place]} times"
        with pytest.raises(KeyboardInterrupt):
            traced(lambda: quantize(model), interrupting(place, times))  # noqa: B023, called at once
        if getattr(model, "is_quantized", False):
            assert_equal(clones(model), quantized)
            assert torch.equal(run_dit(model), outputs_quantized), where
            with pytest.raises(ValueError, match="quantized model cannot be cast"):
                model.to(torch.float16)
            model = load()
            before = state(model)
            continue
        assert state(model) == before, where
        assert_equal(clones(model), values)
        assert torch.equal(run_dit(model), outputs), where
    quantize(model)
    assert_equal(clones(model), quantized)


@pytest.mark.parametrize("build", ["rtn"], indirect=True)
def test_ctrl_c_on_the_lines_between_installing_and_the_last_guard(build, run_dit):
    """Where a model is neither; every third of them."""
    load, quantize = build
    model = load()
    outputs, before = run_dit(model), state(model)
    reached = places_in(load, quantize)
    files = ("quantize.py", "quantizer.py", "guards.py", "installation.py")
    lines = sorted(place for place in reached if Path(place[0]).name in files)
    assert len(lines) > 100
    undone = 0
    for place in lines[::3]:
        with pytest.raises(KeyboardInterrupt):
            traced(lambda: quantize(model), interrupting(place, reached[place]))  # noqa: B023, called at once
        if getattr(model, "is_quantized", False):
            assert {guards._METHOD, guards._LAYERWISE} <= vars(model).keys(), f"a guard is missing after {place}"
            model = load()
            before = state(model)
        else:
            undone += 1
        assert state(model) == before, place
    assert undone > 20 and torch.equal(run_dit(model), outputs)


def test_a_pipeline_generates_after_ctrl_c(dit_folder, dit_statistics):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    pipe.set_progress_bar_config(disable=True)

    def image():
        seed = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe([1], generator=seed, num_inference_steps=2, output_type="np").images)

    before = image()
    place = (PACKAGE + "guards.py", guards.protect.__code__.co_firstlineno + 3)
    with pytest.raises(KeyboardInterrupt):
        traced(
            lambda: dq.quantize(pipe, dq.DQConfig("htg"), statistics=dit_statistics, progress=False),
            interrupting(place, 1),
        )
    assert torch.equal(image(), before)
