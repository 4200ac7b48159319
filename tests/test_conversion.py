# SPDX-License-Identifier: Apache-2.0
"""Quantized layers wait in mapped files: same results, no file left behind, and a model that failures leave alone."""

import errno
import mmap
import sys
import tempfile

import pytest
import torch
from diffusers import DiTPipeline

import diffusers_dq as dq
from diffusers_dq import conversion
from diffusers_dq.conversion import Conversion
from diffusers_dq.linear import QuantizedLinear

HTG = {"method": "htg", "groups": 3, "search": "minmax"}
SPILLED = 1  # bytes from which a tensor gets a file: all of them, in a model this small


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(conversion, "_WORTH_A_FILE", SPILLED)
    return tmp_path


@pytest.fixture
def model(dit_folder):
    return DiTPipeline.from_pretrained(dit_folder).transformer


def everything(model):
    """All by which a model could have changed: tensors, modules, hooks, forwards, attributes."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: (module, set(vars(module))) for name, module in model.named_modules()},
        {name: list(getattr(model, name)) for name in ("_forward_pre_hooks", "_forward_hooks")},
        [getattr(module, "processor", None) for module in model.modules()],
    )


def assert_same(after, before):
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])


def quantize(model, config, statistics):
    dq.quantize(model, dq.DQConfig(**config), statistics=statistics, progress=False)


@pytest.mark.parametrize(
    "config",
    [
        HTG,
        HTG | {"weight_bits": 4, "quantize_attention": True},
        HTG | {"weight_bits": 16, "activation_bits": 16},
        {"method": "quarot", "weight_bits": 4, "group_size": 32},
        {"method": "svdquant", "weight_bits": 4},
        {"method": "ptqd"},  # runs the layers before they are installed
    ],
)
def test_results_are_those_of_layers_in_memory(
    dit_folder, dit_statistics, folder, run_dit, monkeypatch, tmp_path, config
):
    models = [DiTPipeline.from_pretrained(dit_folder).transformer for _ in range(2)]
    quantize(models[0], config, dit_statistics)
    monkeypatch.setattr(conversion, "_WORTH_A_FILE", 1 << 30)
    quantize(models[1], config, dit_statistics)
    spilled, kept = (dict(model.named_parameters()) | dict(model.named_buffers()) for model in models)
    assert spilled.keys() == kept.keys()
    assert all(torch.equal(spilled[name], kept[name]) for name in kept)
    assert torch.equal(run_dit(models[0]), run_dit(models[1]))
    assert not list(folder.iterdir())


def test_what_is_large_is_mapped_from_a_pages_start(model, dit_statistics, folder, monkeypatch):
    monkeypatch.setattr(conversion, "_WORTH_A_FILE", 32 * 32)
    quantize(model, HTG, dit_statistics)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert all(layer.weight.data_ptr() % mmap.PAGESIZE == 0 for layer in layers)
    with open("/proc/self/maps") as maps:
        assert sum(str(folder) in line for line in maps) >= len(layers)


def test_a_spilled_layer_is_the_same_layer(folder):
    linear = torch.nn.Linear(8, 4)
    weight, value = linear.weight, linear.weight.detach().clone()
    conversion.spill(linear)
    assert linear.weight is weight and torch.equal(weight, value)
    with torch.no_grad():
        weight.zero_()  # the mapping is private
    assert not weight.any()


def test_a_spilled_layer_goes_to_another_process(folder):
    linear = torch.nn.Linear(8, 4)
    conversion.spill(linear)
    assert not linear.weight.is_shared()
    sums = torch.multiprocessing.get_context("fork").Queue()
    sums.put(linear.weight)
    assert torch.equal(sums.get(timeout=60), linear.weight)


# Failures


def raising(error, at, function):
    """`function`, raising at its n-th call."""
    calls = []

    def call(*arguments, **keywords):
        calls.append(None)
        if len(calls) == at:
            raise error
        return function(*arguments, **keywords)

    return call


@pytest.mark.parametrize("error", [MemoryError("no memory"), KeyboardInterrupt("stop")])
@pytest.mark.parametrize("where", ["build_linear", "torch.from_file"])
def test_a_failure_while_layers_are_built_leaves_the_model_as_it_was(
    model, dit_statistics, folder, monkeypatch, where, error
):
    target = conversion if where == "build_linear" else torch
    name = where.rpartition(".")[2]
    monkeypatch.setattr(target, name, raising(error, 9, getattr(target, name)))
    before = everything(model)
    with pytest.raises(type(error), match=str(error)):
        quantize(model, HTG, dit_statistics)
    assert_same(everything(model), before)
    assert not list(folder.iterdir())


def test_a_full_disk_is_named(model, dit_statistics, folder, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def file(**arguments):
        opened = named(**arguments)
        opened.write = raising(full, 1, opened.write)
        return opened

    named = tempfile.NamedTemporaryFile
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", raising(None, 0, file))
    before = everything(model)
    with pytest.raises(OSError, match=rf"No space left on device.*make room in {folder}, or set TMPDIR") as raised:
        quantize(model, HTG, dit_statistics)
    assert raised.value.errno == errno.ENOSPC
    assert_same(everything(model), before)
    assert not list(folder.iterdir())


def test_ctrl_c_on_any_line_of_the_installation_leaves_the_model_as_it_was(model, dit_statistics, folder):
    config = dq.DQConfig(**HTG, quantize_attention=True)
    with torch.no_grad():
        done = Conversion(model, config, dit_statistics, model.dtype)
        done.build_all(progress=False)
    before = everything(model)
    at = 0
    while interrupted(done.finish, at, ("installation.py", "fusion.py")):
        assert_same(everything(model), before)
        at += 1
    assert at > 50
    assert isinstance(model.transformer_blocks[0].attn1.to_q, QuantizedLinear)


def interrupted(function, at, files):
    """Calls it, and raises KeyboardInterrupt in it once, at a line of `install` or what that calls in these files,
    the `at`-th there. False where it comes to its end first."""
    lines = [0]

    def on_line(frame, event, argument):
        if event == "line":
            lines[0] += 1
            if lines[0] == at + 1:
                raise KeyboardInterrupt
        return on_line

    def on_call(frame, event, argument):
        frames, inside = frame, False
        while frames is not None and not inside:
            inside, frames = frames.f_code.co_name == "install", frames.f_back
        return on_line if inside and frame.f_code.co_filename.endswith(files) else None

    tracing = sys.gettrace()
    sys.settrace(on_call)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(tracing)
    return False
