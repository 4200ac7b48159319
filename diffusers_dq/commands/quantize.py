# SPDX-License-Identifier: Apache-2.0
"""`diffusers-dq quantize ...`"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from diffusers import DiffusionPipeline

import diffusers_dq as dq
from diffusers_dq.commands.calibrate import resumable
from diffusers_dq.commands.console import check_folder, device_of, emit, note
from diffusers_dq.commands.options import (
    ActivationBits,
    Component,
    Conditions,
    Config,
    Device,
    Dtype,
    Json,
    Method,
    Model,
    Option,
    OutputFolder,
    Overwrite,
    Preset,
    Seed,
    StatisticsFile,
    Steps,
    WeightBits,
    calling,
    config_of,
)
from diffusers_dq.evaluation.loading import load_pipeline
from diffusers_dq.files import OfAnotherRun
from diffusers_dq.report import QuantizationReport
from diffusers_dq.saving import fill
from diffusers_dq.statistics import Statistics


@calling
def quantize(
    model: Model,
    output: OutputFolder,
    method: Method = None,
    preset: Preset = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    option: Option = None,
    config: Config = None,
    statistics: StatisticsFile = None,
    *,
    conditions: Conditions,
    steps: Steps = 50,
    seed: Seed = 0,
    component: Component = None,
    overwrite: Overwrite = False,
    device: Device = "",
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Quantize a pipeline's transformer and save the pipeline.

    Without --statistics, a method that needs them calibrates first, on what --prompt and its kin say, and keeps them
    beside --output; Ctrl-C leaves what the same command goes on from.
    """
    settings = config_of(method, preset, weight_bits, activation_bits, option, config)
    if Path(model).is_dir() and output.resolve() == Path(model).resolve():
        raise typer.BadParameter("--output is the model's own folder, which it would overwrite; give another")
    if statistics is not None:
        Statistics.load(statistics)  # what is wrong with it is said before the model is loaded
    check_folder(output, overwrite=overwrite)
    pipe = load_pipeline(model, dtype, device_of(device))
    found: Any = statistics or settings.statistics
    if found is None and settings.needs_statistics:
        found = output.parent / f"{output.name}.statistics.safetensors"
        arguments = conditions.calls_of(pipe)
        output.parent.mkdir(parents=True, exist_ok=True)
        sampling: dict[str, Any] = dict(num_inference_steps=steps, seed=seed, component=component)
        resumable(pipe, arguments, found, overwrite=overwrite, **sampling)
    learned = output.parent / f"{output.name}.reconstruction"
    learns = settings.recipe.rounding == "adaround"
    given: dict[str, Any] = dict(statistics=found, component=component)
    try:
        if learns:
            report = learning(pipe, settings, learned, overwrite=overwrite, **given)
        else:
            report = dq.quantize(pipe, settings, **given)
        save(pipe, output)
    except KeyboardInterrupt:
        kept = ", ".join(str(place) for place in (found, learned) if place is not None and Path(place).exists())
        raise KeyboardInterrupt(f"the same command goes on from {kept or 'the start'}") from None
    if learns:
        learned.unlink(missing_ok=True)
    content = {
        "output": output,
        "method": report.method,
        "config": settings.to_diff_dict(),
        "statistics": found,
        "quantized": len(report.quantized),
        "kept": report.kept,
        "bytes": report.nbytes,
        "linears": [asdict(row) for row in report.linears],
    }
    text = f"{report}\nwritten: {output}" + (f"\nstatistics: {found}" if found else "")
    emit(content, text, as_json=json)
    if all(row.bits == "W16A16" for row in report.quantized):
        note("nothing was rounded: every linear has 16 bits or was left out")


def learning(
    pipe: DiffusionPipeline, settings: dq.DQConfig, checkpoint: Path, *, overwrite: bool, **given: Any
) -> QuantizationReport:
    """`dq.quantize` with a checkpoint.   overwrite: one of another run is replaced. Raises ValueError without it."""
    try:
        return dq.quantize(pipe, settings, checkpoint=checkpoint, **given)
    except OfAnotherRun as error:
        if not overwrite:
            raise ValueError(f"{error}, or delete {checkpoint}") from None
        note(f"{error}: starting anew")
        checkpoint.unlink()
        return dq.quantize(pipe, settings, checkpoint=checkpoint, **given)


def save(pipe: DiffusionPipeline, output: Path) -> None:
    """A new or empty folder is filled all at once, or stays as it is. Another one file by file: what the pipeline does
    not write stays, and the checksum in config.json notices where this was interrupted."""
    if output.is_dir() and any(output.iterdir()):
        pipe.save_pretrained(output)
        return
    fill(output, pipe.save_pretrained)
