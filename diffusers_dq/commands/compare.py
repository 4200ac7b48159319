# SPDX-License-Identifier: Apache-2.0
"""`diffusers-dq compare ...`"""

from math import isnan
from pathlib import Path
from typing import Annotated, Any

import typer
from diffusers import DiffusionPipeline

import diffusers_dq as dq
from diffusers_dq.commands.console import check_folder, device_of, emit, note
from diffusers_dq.commands.options import (
    Component,
    Conditions,
    Device,
    Dtype,
    Json,
    OutputFolder,
    Overwrite,
    Seed,
    StatisticsFile,
    Steps,
    calling,
)
from diffusers_dq.denoise import denoiser
from diffusers_dq.evaluation.comparison import Comparison
from diffusers_dq.evaluation.loading import load_pipeline, pipeline_folder
from diffusers_dq.evaluation.plots import quality_against_size, save_figure
from diffusers_dq.statistics import Statistics


@calling
def compare(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="the model in full precision")],
    quantized: Annotated[list[str], typer.Argument(metavar="MODEL...", help="one quantized model, or several")],
    output: OutputFolder,
    statistics: StatisticsFile = None,
    *,
    conditions: Conditions,
    steps: Steps = 50,
    seed: Seed = 0,
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="also the error of each linear")] = True,
    component: Component = None,
    overwrite: Overwrite = False,
    device: Device = "",
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Run models on the same seeds: how far apart, where, and pictures of it.

    Writes comparison.json, grid.png with difference maps, layer_snr.png and, with --statistics, activation_ranges.png
    with the timestep groups of the model; for several models, a folder each and quality_size.png.
    """
    names = _names(quantized)
    check_folder(output, overwrite=overwrite)
    for model in (reference, *quantized):
        pipeline_folder(model)  # all are there, before hours of work on the first
    observed = Statistics.load(statistics) if statistics is not None else None
    place = device_of(device)
    pipe = load_pipeline(reference, dtype, place)
    full_bytes = weight_bytes(reference, pipe, component)
    arguments = conditions.calls_of(pipe)
    if observed is not None:
        observed.check_model(denoiser(pipe, component))
    models: list[dict[str, Any]] = []
    files: list[Path] = []
    for model, name in zip(quantized, names, strict=True):
        twin = load_pipeline(model, dtype, place)
        found = dq.compare(
            pipe, twin, arguments, num_inference_steps=steps, seed=seed, layers=layers, component=component
        )
        folder = output if len(quantized) == 1 else output / name
        files += found.save(folder, statistics=observed, model=denoiser(twin, component))
        models.append({"model": model, "name": name, **_figures(found), "bytes": weight_bytes(model, twin, component)})
        del twin
    if len(models) > 1:
        points = {row["name"]: (row["bytes"], row["psnr_db"]) for row in models if not isnan(row["psnr_db"])}
        for name in sorted({row["name"] for row in models} - points.keys()):
            note(f"{name} is not in quality_size.png: its pictures are not finite, the model has diverged")
        if points:
            files.append(output / "quality_size.png")
            save_figure(quality_against_size(points, reference_bytes=full_bytes), files[-1])
    content = {
        "reference": reference,
        "reference_bytes": full_bytes,
        "steps": steps,
        "seed": seed,
        "pictures": sum(len(next(iter(call.values()))) for call in arguments if "class_labels" in call)
        or len(arguments),
        "models": models,
        "files": files,
    }
    emit(content, _table(models, full_bytes) + "".join(f"\nwritten: {file}" for file in files), as_json=json)


def weight_bytes(model: str, pipe: DiffusionPipeline, component: str | None) -> int:
    """Of the transformer's safetensors files where `model` is a folder, else of its tensors in memory."""
    files = list((Path(model) / (component or "transformer")).glob("*.safetensors"))
    if files:
        return sum(file.stat().st_size for file in files)
    return sum(tensor.nbytes for tensor in denoiser(pipe, component).state_dict().values())


def _names(models: list[str]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [Path(model).resolve().parts if Path(model).exists() else tuple(model.split("/")) for model in models]
    for length in range(1, 1 + max(map(len, parts))):
        names = ["-".join(part[-length:]).strip("/") for part in parts]
        if len(set(names)) == len(names):
            return names
    raise typer.BadParameter("a model is given twice")


def _figures(found: Comparison) -> dict[str, Any]:
    return {
        "psnr_db": found.mean_psnr,
        "ssim": found.mean_ssim,
        "latent_snr_db": float(found.latent_snr[-1]),
        "worst_layers": dict(found.worst_layers(5)),
    }


def _table(models: list[dict[str, Any]], full_bytes: int) -> str:
    width = max(12, *(len(row["name"]) for row in models))
    lines = [f"{'model':<{width}}  {'PSNR dB':>8}  {'SSIM':>7}  {'latent SNR dB':>13}  {'bytes':>15}  of full"]
    for row in models:
        share = f"{row['bytes'] / full_bytes:.0%}"
        lines.append(
            f"{row['name']:<{width}}  {row['psnr_db']:>8.2f}  {row['ssim']:>7.4f}  {row['latent_snr_db']:>13.1f}"
            f"  {row['bytes']:>15,}  {share:>7}"
        )
    for row in models:
        worst = ", ".join(f"{name} {decibels:.1f} dB" for name, decibels in list(row["worst_layers"].items())[:3])
        if worst:
            lines.append(f"least accurate linears of {row['name']}: {worst}")
    return "\n".join(lines)
