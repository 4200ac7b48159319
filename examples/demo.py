# SPDX-License-Identifier: Apache-2.0
"""A trained diffusion transformer, calibrated over its denoising steps and quantized six ways: `make demo`.

Needs no download: the model is in examples/dit-cifar10. Writes a picture grid and a table of what it cost in quality.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import DiTPipeline

import diffusers_dq as dq
from diffusers_dq.denoise import quiet, run_call
from diffusers_dq.evaluation import image_grid, psnr, ssim

MODEL = Path(__file__).parent / "dit-cifar10"
RECIPES = {
    "RTN W8A8": dq.DQConfig("rtn", weight_bits=8, activation_bits=8, dynamic=False),
    "RTN W4A8": dq.DQConfig("rtn", weight_bits=4, activation_bits=8, dynamic=False),
    "HTG W8A8": dq.DQConfig("htg", weight_bits=8, activation_bits=8),
    "HTG W4A8": dq.DQConfig("htg", weight_bits=4, activation_bits=8),
    "quality W8A8": dq.DQConfig(preset="quality", weight_bits=8, activation_bits=8),
    "quality W4A8": dq.DQConfig(preset="quality", weight_bits=4, activation_bits=8),
}


@dataclass
class Result:
    images: np.ndarray  # [n, H, W, 3] in [0, 1]
    file_bytes: int
    seconds: float  # an image


def load() -> DiTPipeline:
    return DiTPipeline.from_pretrained(MODEL)


def transformer_bytes(pipe: DiTPipeline) -> int:
    """What `save_pretrained` writes for the transformer's weights."""
    with tempfile.TemporaryDirectory() as folder:
        pipe.transformer.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def measure(pipe: DiTPipeline, images: int, steps: int) -> Result:
    call = dict(class_labels=[i % 10 for i in range(images)], guidance_scale=1.5)
    with quiet(pipe):
        run_call(pipe, call, num_inference_steps=2, seed=0)  # the first steps of a process are slower
        start = time.perf_counter()
        pictures = run_call(pipe, call, num_inference_steps=steps, seed=1234, output_type="np")
        seconds = (time.perf_counter() - start) / images
    return Result(pictures, transformer_bytes(pipe), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10, help="pictures a method, one class after the other")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps, of calibration and of generation")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    pipe = load()
    calls = [dict(class_labels=[i % 10 for i in range(32)], guidance_scale=1.5)]
    statistics = dq.calibrate(pipe, calls, num_inference_steps=arguments.steps, seed=0)
    results = {"full precision": measure(pipe, arguments.images, arguments.steps)}
    for name, config in RECIPES.items():
        print(f"\n{name}")
        pipe = load()
        dq.quantize(pipe, config, statistics=statistics)
        results[name] = measure(pipe, arguments.images, arguments.steps)

    grid = arguments.output / "grid.png"
    image_grid({name: result.images for name, result in results.items()}).save(grid)
    print(f"\n{table(results)}\n\npictures, the same seeds in every row: {grid.resolve()}")


def table(results: dict[str, Result]) -> str:
    reference = results["full precision"]
    lines = [f"{'method':<16}{'bits':<10}{'PSNR dB':>9}{'SSIM':>8}{'file bytes':>14}{'s / image':>11}"]
    for name, result in results.items():
        method, bits = (name, "fp32") if result is reference else name.split()
        quality = f"{'':>9}{'':>8}"
        if result is not reference:
            decibels = float(np.mean(psnr(reference.images, result.images)))
            similarity = float(np.mean(ssim(reference.images, result.images)))
            quality = f"{decibels:>9.2f}{similarity:>8.4f}"
        lines.append(f"{method:<16}{bits:<10}{quality}{result.file_bytes:>14,}{result.seconds:>11.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
