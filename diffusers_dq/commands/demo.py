# SPDX-License-Identifier: Apache-2.0
"""`diffusers-dq demo`"""

import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

import diffusers_dq as dq
from diffusers_dq.commands.console import check_folder, device_of, emit
from diffusers_dq.commands.options import Device, Json, OutputFolder, Overwrite, Seed
from diffusers_dq.denoise import quiet, run_call
from diffusers_dq.evaluation.loading import load_pipeline
from diffusers_dq.evaluation.metrics import Array, optional, psnr, ssim
from diffusers_dq.evaluation.plots import activation_ranges, image_grid, quality_against_size, save_figure
from diffusers_dq.files import write_whole

MODEL = Path(dq.__file__).parent / "demo_model"  # in a checkout a link to examples/dit-cifar10
RECIPES: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn", "dynamic": False},
    "HTG": {"method": "htg"},
    "quality": {"preset": "quality"},
}
BITS = ((8, 8), (4, 8))
_CLASSES = 10
_GUIDANCE = 1.5


@dataclass(frozen=True)
class _Result:
    images: Array  # [n, H, W, 3] in [0, 1]
    nbytes: int
    seconds: float  # an image


def demo(
    output: OutputFolder = Path("demo_output"),
    model: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="the demo model; by default the one in the package")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="pictures a method, one class after the other")] = 10,
    steps: Annotated[int, typer.Option("--steps", min=2, help="denoising steps, of calibration and of pictures")] = 25,
    seed: Seed = 1234,
    overwrite: Overwrite = True,
    device: Device = "",
    json: Json = False,
) -> None:
    """Quantize the trained demo model six ways: a table and pictures, no download.

    Writes grid.png, quality_size.png and activation_ranges.png.
    """
    folder = model or MODEL
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the demo model is not in {folder}: give --model the folder examples/dit-cifar10 of a checkout"
        )
    check_folder(output, overwrite=overwrite)
    for module in ("torchmetrics.functional.image", "matplotlib"):
        optional(module)  # now, rather than after a run
    place = device_of(device)
    whole = load_pipeline(str(folder), "float32", place)
    calls = [dict(class_labels=[i % _CLASSES for i in range(32)], guidance_scale=_GUIDANCE)]
    statistics = dq.calibrate(whole, calls, num_inference_steps=steps, seed=0)
    names = [f"{name} W{w}A{a}" for w, a in BITS for name in RECIPES]
    results: dict[str, _Result] = {}
    grouped = None
    for name in tqdm(["full precision", *names], desc="models", unit="model"):
        pipe = deepcopy(whole)
        if name in names:
            recipe, bits = name.split()
            weight, activation = (int(part) for part in bits[1:].split("A"))
            settings = {**RECIPES[recipe], "weight_bits": weight, "activation_bits": activation}
            dq.quantize(pipe, dq.DQConfig(**settings), statistics=statistics, progress=False)
            grouped = pipe.transformer if recipe == "HTG" else grouped
        results[name] = _measure(pipe, images, steps, seed)
    reference = results["full precision"]
    rows = {name: _row(reference, result) for name, result in results.items()}
    grid = image_grid({name: result.images[:10] for name, result in results.items()})
    write_whole(output / "grid.png", lambda file: grid.save(file, format="png"))
    points = {name: (row["bytes"], row["psnr_db"]) for name, row in rows.items() if name in names}
    save_figure(quality_against_size(points, reference_bytes=reference.nbytes), output / "quality_size.png")
    save_figure(activation_ranges(statistics, grouped), output / "activation_ranges.png")
    files = [output / f"{name}.png" for name in ("grid", "quality_size", "activation_ranges")]
    text = "\n".join([_table(rows), "", *(f"written: {file}" for file in files)])
    emit({"steps": steps, "images": images, "seed": seed, "models": rows, "files": files}, text, as_json=json)


def _measure(pipe: DiffusionPipeline, images: int, steps: int, seed: int) -> _Result:
    call = dict(class_labels=[i % _CLASSES for i in range(images)], guidance_scale=_GUIDANCE)
    with quiet(pipe):
        run_call(pipe, call, num_inference_steps=2, seed=0)  # the first steps of a process are slower
        start = time.perf_counter()
        pictures = run_call(pipe, call, num_inference_steps=steps, seed=seed, output_type="np")
        seconds = (time.perf_counter() - start) / images
    with tempfile.TemporaryDirectory() as folder:
        pipe.transformer.save_pretrained(folder)
        nbytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return _Result(pictures, nbytes, seconds)


def _row(reference: _Result, result: _Result) -> dict[str, Any]:
    same = result is reference
    return {
        "psnr_db": None if same else float(psnr(reference.images, result.images).mean()),
        "ssim": None if same else float(ssim(reference.images, result.images).mean()),
        "bytes": result.nbytes,
        "seconds_per_image": result.seconds,
    }


def _table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'model':<16}{'PSNR dB':>9}{'SSIM':>8}{'file bytes':>14}{'s / image':>11}"]
    for name, row in rows.items():
        quality = f"{'':>17}" if row["ssim"] is None else f"{row['psnr_db']:>9.2f}{row['ssim']:>8.4f}"
        lines.append(f"{name:<16}{quality}{row['bytes']:>14,}{row['seconds_per_image']:>11.3f}")
    return "\n".join(lines)
