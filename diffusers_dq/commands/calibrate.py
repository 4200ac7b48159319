# SPDX-License-Identifier: Apache-2.0
"""`diffusers-dq calibrate ...`"""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from diffusers import DiffusionPipeline

import diffusers_dq as dq
from diffusers_dq.commands.console import device_of, emit, note
from diffusers_dq.commands.options import (
    Component,
    Conditions,
    Device,
    Dtype,
    Json,
    Model,
    Seed,
    Steps,
    calling,
)
from diffusers_dq.evaluation.loading import load_pipeline
from diffusers_dq.files import OfAnotherRun, check_writable
from diffusers_dq.statistics import Statistics


@calling
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="the statistics, for quantize")],
    *,
    conditions: Conditions,
    steps: Steps = 50,
    seed: Seed = 0,
    second_moments: Annotated[
        bool, typer.Option("--second-moments", help="for --option rounding=gptq, exactly")
    ] = False,
    samples: Annotated[int, typer.Option("--samples", min=0, help="whole inputs kept, for reconstruction")] = 32,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="kept until the end; by default FILE of --output and .checkpoint"),
    ] = None,
    component: Component = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace statistics that are there, and a checkpoint of another run")
    ] = False,
    device: Device = "",
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Observe a model's activations over its denoising steps.

    Call it as the model will be used: prompts or labels, guidance, size. After each call a checkpoint is written:
    after Ctrl-C the same command goes on behind the last whole one.
    """
    check_writable(output)
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} is there already: --overwrite replaces it, or give another --output")
    pipe = load_pipeline(model, dtype, device_of(device))
    arguments = conditions.calls_of(pipe)
    checkpoint = checkpoint or output.with_name(f"{output.name}.checkpoint")
    settings: dict[str, Any] = dict(second_moments=second_moments, samples=samples, component=component)
    settings |= dict(num_inference_steps=steps, seed=seed)
    statistics = resumable(pipe, arguments, checkpoint, overwrite=overwrite, **settings)
    statistics.save(output)
    checkpoint.unlink(missing_ok=True)
    content = {
        "statistics": output,
        "bytes": output.stat().st_size,
        "calls": len(arguments),
        "timesteps": len(statistics.timesteps),
        "activations": len(statistics.sites),
        "about": dict(statistics.about),
    }
    text = (
        f"{len(statistics.sites)} activations at {len(statistics.timesteps)} timesteps, {len(arguments)} calls\n"
        f"written: {output} ({content['bytes']:,} bytes)\n"
        f"next: diffusers-dq quantize {shlex.quote(model)} --statistics {shlex.quote(str(output))}"
        " --preset quality --output FOLDER"
    )
    emit(content, text, as_json=json)


def resumable(
    pipe: DiffusionPipeline, calls: list[dict[str, Any]], checkpoint: Path, *, overwrite: bool = False, **settings: Any
) -> Statistics:
    """`dq.calibrate` with a checkpoint; Ctrl-C says what is kept and how to go on.

    overwrite: a checkpoint of another run is replaced. Raises ValueError for one without it.
    """
    if checkpoint.exists():
        note(f"going on from {checkpoint}; delete it to start anew")
    try:
        return dq.calibrate(pipe, calls, checkpoint=checkpoint, **settings)
    except OfAnotherRun as error:
        if not overwrite:
            raise ValueError(f"{error}, or delete {checkpoint}") from None
        note(f"{error}: starting anew")
        checkpoint.unlink()
        return resumable(pipe, calls, checkpoint, **settings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(checkpoint, len(calls))) from None


def _how_to_go_on(checkpoint: Path, calls: int) -> str:
    if not checkpoint.exists():
        return "no call was complete, nothing is kept; the same command starts anew"
    done = Statistics.load(checkpoint).about["calls_done"]
    return (
        f"{done} of {calls} calls are kept in {checkpoint}; go on with: {shlex.join(['diffusers-dq', *sys.argv[1:]])}"
    )
