# SPDX-License-Identifier: Apache-2.0
"""From calibration to a reloaded pipeline, through diffusers' own pipeline classes with tiny parts."""

import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import PIPELINES, TinyPipeline
from tiny_pipelines.wan import TWO_DENOISERS
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import diffusers_dq as dq
from diffusers_dq.denoise import DENOISERS, TimestepArgument, run_call
from diffusers_dq.specs import spec_of

STEPS = 4
HTG = dq.DQConfig("htg", weight_bits=8, activation_bits=8, groups=3)
# Two blocks are a dozen linears in a row, each with a rounding error of its own; they add up in squares, by sqrt(12).
# Activations of 8 bits, 12 sigma in 255 steps: 12 / 255 / sqrt(12) = 1.4 percent of a linear's output. Weights of 4
# bits, uniform in [-a, a]: (2 a / 15 / sqrt(12)) / (a / sqrt(3)) = 6.7 percent.
TOLERANCES = {8: 12**0.5 * 0.014, 4: 12**0.5 * 0.067}

every_pipeline = pytest.mark.parametrize("tiny", PIPELINES.values(), ids=lambda tiny: tiny.name)
IN_ANOTHER_PROCESS = """
import sys, torch
import diffusers, diffusers_dq
from diffusers_dq.denoise import run_call
sys.path.insert(0, sys.argv[1])
from tiny_pipelines import PIPELINES
torch.set_num_threads(1)
tiny = PIPELINES[sys.argv[2]]
pipe = tiny.load(sys.argv[3])
torch.save(torch.as_tensor(run_call(pipe, tiny.call, num_inference_steps=4, seed=3, output_type="np")), sys.argv[4])
"""


@functools.cache
def statistics_of(name: str) -> dq.Statistics:
    tiny = PIPELINES[name]
    if tiny.like:
        return statistics_of(tiny.like)
    # Four calls, for a few dozen tokens are too few: those of other noise would be clipped.
    statistics = dq.calibrate(tiny.build(), [tiny.call] * 4, num_inference_steps=STEPS, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        statistics.save(Path(folder) / "statistics.safetensors")
        return dq.Statistics.load(Path(folder) / "statistics.safetensors")


def quantized(tiny: TinyPipeline, config: dq.DQConfig = HTG) -> DiffusionPipeline:
    pipe = tiny.build()
    report = dq.quantize(pipe, config, statistics=statistics_of(tiny.name), progress=False)
    assert len(report.quantized) > len(report.kept) / 2
    return pipe


def generate(pipe: DiffusionPipeline, tiny: TinyPipeline, output_type: str, steps: int = STEPS) -> Tensor:
    output = run_call(pipe, tiny.call, num_inference_steps=steps, seed=3, output_type=output_type)
    return torch.as_tensor(output)


def full_precision(pipe: DiffusionPipeline, tiny: TinyPipeline, steps: int = STEPS) -> tuple[Tensor, float]:
    """The latents, and how far off they would be if the transformer predicted nothing: what errors are measured by.

    Predictions are halved for that and the distance is doubled, because some guidance divides by their size.
    """
    latents = generate(pipe, tiny, "latent", steps)
    models = [getattr(pipe, name) for name in DENOISERS if getattr(pipe, name, None) is not None]
    handles = [
        model.register_forward_hook(lambda module, args, output: tree_map(lambda x: x / 2, output)) for model in models
    ]
    try:
        return latents, 2 * float((generate(pipe, tiny, "latent", steps) - latents).norm())
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watching(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
    """For each forward, the timestep it was given, and the groups [P] that were selected for it."""
    seen: list[tuple[Tensor, Tensor | None]] = []
    argument = TimestepArgument.of(model)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        groups = getattr(module, "timestep_groups", None)
        seen.append((argument.read(args, kwargs).float(), None if groups is None else groups.index.clone()))

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def check_groups(model: Any, descending: bool, seen: list[tuple[Tensor, Tensor | None]]) -> None:
    """The group is that of the noisiest token's timestep, and it changes on the way, in one direction."""
    groups = [group.tolist() for _, group in seen]
    for (timestep, _), selected in zip(seen, groups, strict=True):
        noisiest = timestep.max() if descending else timestep.min()
        assert selected == [int((edges < noisiest).sum()) for edges in model.timestep_boundaries]
    path = [max(selected) for selected in groups]
    assert len(set(path)) > 1, "one group at every step"
    assert path == sorted(path, reverse=descending)


@every_pipeline
def test_w8a8_by_timestep_groups_is_close_and_the_same_after_reloading(tiny, tmp_path):
    latents, scale = full_precision(tiny.build(), tiny)
    pipe = quantized(tiny)
    with watching(pipe.transformer) as seen:
        output = generate(pipe, tiny, "latent")
    check_groups(pipe.transformer, statistics_of(tiny.name).descending, seen)
    assert 0 < (output - latents).norm() < TOLERANCES[8] * scale

    pictures = generate(pipe, tiny, "np")
    assert torch.isfinite(pictures).all()
    pipe.save_pretrained(tmp_path)
    again = tiny.load(tmp_path)
    assert torch.equal(generate(again, tiny, "latent"), output)
    assert torch.equal(generate(again, tiny, "np"), pictures)


@every_pipeline
@pytest.mark.parametrize("method", ["rtn", "quarot"])
def test_w4a8_is_close(tiny, method):
    latents, scale = full_precision(tiny.build(), tiny)
    output = generate(quantized(tiny, dq.DQConfig(method, weight_bits=4, activation_bits=8)), tiny, "latent")
    assert 0 < (output - latents).norm() < TOLERANCES[4] * scale


@every_pipeline
def test_another_number_of_steps_and_another_scheduler(tiny):
    full, pipe = tiny.build(), quantized(tiny)
    descending = statistics_of(tiny.name).descending
    for scheduler in (None, tiny.other):
        if scheduler is not None:
            full.scheduler, pipe.scheduler = scheduler(), scheduler()
        with watching(pipe.transformer) as seen:
            output = generate(pipe, tiny, "latent", steps=7)
        check_groups(pipe.transformer, descending, seen)
        calibrated = statistics_of(tiny.name).timesteps.tolist()
        assert not {float(timestep.max()) for timestep, _ in seen} <= {*calibrated}, "these steps are new"
        latents, scale = full_precision(full, tiny, steps=7)
        assert 0 < (output - latents).norm() < TOLERANCES[8] * scale


@every_pipeline
def test_timesteps_lie_where_the_spec_says(tiny):
    pipe = tiny.build()
    with watching(pipe.transformer) as seen:
        generate(pipe, tiny, "latent")
    timesteps = [timestep for timestep, _ in seen]
    per_token = any(float(t.min()) != float(t.max()) or t.ndim > 1 for t in timesteps)
    assert per_token == tiny.per_token
    known = spec_of(pipe.transformer).timestep
    descending = statistics_of(tiny.name).descending
    if known is not None:
        assert known.argument == TimestepArgument.of(pipe.transformer).name
        low, high = sorted((known.noisiest, known.cleanest))
        assert all(low <= float(t.min()) and float(t.max()) <= high for t in timesteps)
        assert known.descending == descending
        assert known.per_token or not per_token
    noisiest = [float(t.max() if descending else t.min()) for t in timesteps]
    assert noisiest == sorted(noisiest, reverse=descending)


def test_two_denoisers_each_with_its_share_of_the_steps(tmp_path):
    full, pipe = TWO_DENOISERS.build(), TWO_DENOISERS.build()
    latents, scale = full_precision(full, TWO_DENOISERS, steps=8)
    statistics = {
        name: dq.calibrate(full, [TWO_DENOISERS.call] * 4, num_inference_steps=8, component=name, progress=False)
        for name in DENOISERS
    }
    noisy, clean = (statistics[name].timesteps for name in DENOISERS)
    assert len(noisy) == len(clean) == 4 and noisy.min() >= 800 > clean.max()
    for name in DENOISERS:
        with pytest.raises(ValueError, match="other weights"):
            dq.quantize(full, HTG, statistics=statistics[name], component=({*DENOISERS} - {name}).pop())
        dq.quantize(pipe, HTG, statistics=statistics[name], component=name, progress=False)

    with watching(pipe.transformer) as first, watching(pipe.transformer_2) as second:
        output = generate(pipe, TWO_DENOISERS, "latent", steps=8)
    for model, seen in ((pipe.transformer, first), (pipe.transformer_2, second)):
        check_groups(model, True, seen)
        assert len(seen) == 2 * 4  # guided: two forwards a step
    assert 0 < (output - latents).norm() < TOLERANCES[8] * scale
    pipe.save_pretrained(tmp_path)
    assert torch.equal(generate(TWO_DENOISERS.load(tmp_path), TWO_DENOISERS, "latent", steps=8), output)


@pytest.mark.parametrize("name", ["DiT", "Wan"])
def test_a_fresh_process_generates_the_same(name, tmp_path):
    tiny = PIPELINES[name]
    pipe = quantized(tiny)
    pipe.save_pretrained(tmp_path / "pipe")
    arguments = [Path(__file__).parent, name, tmp_path / "pipe", tmp_path / "output.pt"]
    done = subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "output.pt"), generate(pipe, tiny, "np"))
