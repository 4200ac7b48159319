# SPDX-License-Identifier: Apache-2.0
"""`diffusers-dq generate ...`"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from diffusers_dq.commands.console import check_folder, device_of, emit
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
from diffusers_dq.evaluation.files import write_whole
from diffusers_dq.evaluation.loading import load_pipeline


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
            for j, image in enumerate(_frames(images)):
                path = output / f"seed-{seed + i}-{j:02d}.{'png' if len(image) == 1 else 'webp'}"
                _save(image, path)
                files.append({"file": path, "seed": seed + i, "index": j, "call": call})
    seconds = time.perf_counter() - start
    content = {"model": model, "steps": steps, "seconds": seconds, "pictures": files}
    text = "\n".join([*(str(file["file"]) for file in files), f"{len(files)} in {seconds:.1f} s, {steps} steps"])
    emit(content, text, as_json=json)


def _frames(images: Any) -> list[np.ndarray[Any, Any]]:
    """Of each picture or video [F, H, W, C] uint8; a picture has one frame."""
    if isinstance(images, list):
        images = np.stack(
            [np.stack([np.asarray(f) for f in i]) if isinstance(i, list) else np.asarray(i) for i in images]
        )
    if images.dtype != np.uint8:
        images = (np.nan_to_num(images).clip(0, 1) * 255).round().astype(np.uint8)
    return [image if image.ndim == 4 else image[None] for image in images]


def _save(frames: np.ndarray[Any, Any], path: Path) -> None:
    first, *others = [Image.fromarray(frame) for frame in frames]
    if others:
        write_whole(
            path, lambda f: first.save(f, format="webp", save_all=True, append_images=others, duration=125, loop=0)
        )
    else:
        write_whole(path, lambda f: first.save(f, format="png"))
