# SPDX-License-Identifier: Apache-2.0
"""`diffusers-dq generate ...`"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image
from tqdm.auto import tqdm

from diffusers_dq.commands.console import check_folder, device_of, emit, note
from diffusers_dq.commands.options import (
    Conditions,
    Device,
    Dtype,
    Json,
    Model,
    OutputFolder,
    Overwrite,
    Seed,
    Steps,
    calling,
)
from diffusers_dq.denoise import check_calls, denoiser, quiet, run_call, watching_timestep
from diffusers_dq.evaluation.loading import load_pipeline
from diffusers_dq.files import write_whole


@calling
def generate(
    model: Model,
    output: OutputFolder,
    *,
    conditions: Conditions,
    steps: Steps = 50,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    device: Device = "",
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Make pictures with a pipeline, quantized or not.

    A file a picture, as seed-0-03.png, the fourth of the call with seed 0; of a video an animated .webp.
    """
    check_folder(output, overwrite=overwrite)
    pipe = load_pipeline(model, dtype, device_of(device))
    arguments = conditions.calls_of(pipe)
    check_calls(pipe, arguments)
    files: list[dict[str, Any]] = []
    not_finite = 0
    seen: list[float] = []

    def advance(timestep: float) -> None:
        if seen[-1:] != [timestep]:
            seen.append(timestep)
            bar.update(min(1, end - bar.n))

    start = time.perf_counter()
    bar = tqdm(total=len(arguments) * steps, desc="generate", unit="step")
    first = getattr(pipe, "transformer", None) or denoiser(pipe)
    with bar, quiet(pipe), torch.no_grad(), watching_timestep(first, advance):
        for i, call in enumerate(arguments):
            end = (i + 1) * steps
            images = run_call(pipe, call, num_inference_steps=steps, seed=seed + i, output_type="np")
            bar.update(end - bar.n)
            for j, frames in enumerate(_frames(images)):
                path = output / f"seed-{seed + i}-{j:02d}.{'png' if len(frames) == 1 else 'webp'}"
                not_finite += not np.isfinite(frames).all()
                _save(_bytes(frames), path)
                files.append({"file": path, "seed": seed + i, "index": j, "call": call})
    seconds = time.perf_counter() - start
    content = {"model": model, "steps": steps, "seconds": seconds, "not_finite": not_finite, "pictures": files}
    text = "\n".join([*(str(file["file"]) for file in files), f"{len(files)} in {seconds:.1f} s, {steps} steps"])
    emit(content, text, as_json=json)
    if not_finite:
        note(
            f"{not_finite} of {len(files)} hold values that are not finite, black in the files: the model has"
            " diverged. Try --dtype float32, more bits or another seed"
        )
    if not_finite == len(files):
        raise typer.Exit(1)


def _frames(images: Any) -> list[np.ndarray[Any, Any]]:
    """Of each picture or video [F, H, W, C], as the pipeline gave it; a picture has one frame."""
    if isinstance(images, list):
        images = np.stack(
            [np.stack([np.asarray(f) for f in i]) if isinstance(i, list) else np.asarray(i) for i in images]
        )
    return [image if image.ndim == 4 else image[None] for image in images]


def _bytes(frames: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if frames.dtype == np.uint8:
        return frames
    return (np.nan_to_num(frames).clip(0, 1) * 255).round().astype(np.uint8)


def _save(frames: np.ndarray[Any, Any], path: Path) -> None:
    first, *others = [Image.fromarray(frame) for frame in frames]
    if others:
        write_whole(
            path, lambda f: first.save(f, format="webp", save_all=True, append_images=others, duration=125, loop=0)
        )
    else:
        write_whole(path, lambda f: first.save(f, format="png"))
