# SPDX-License-Identifier: Apache-2.0
"""One forward of a DiT of real width, integer layers against floating point, interleaved in one process.

    python kernels/benchmarks/transformer_step.py                    # this machine's CPU, or GPU where there is one
    python kernels/benchmarks/transformer_step.py --compile          # torch.compile for every variant
    python kernels/benchmarks/transformer_step.py --rounds 2 --layers 1 --width 64 --heads 4    # a dry run

Every round runs each variant once, in a new order, so that whatever else the machine does hits all of them alike. The
weights are random, never zero. Prints a table and writes JSON with hardware, versions, date and commit.
"""

import argparse
import copy
import datetime
import json
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
import triton
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import diffusers_dq as dq

RESULTS = Path(__file__).parent / "results"


def transformer(arguments: argparse.Namespace) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=arguments.heads,
        attention_head_dim=arguments.width // arguments.heads,
        num_layers=arguments.layers,
        sample_size=2 * int(arguments.tokens**0.5),
        out_channels=8,
    ).eval()


def calibrated(model: DiTTransformer2DModel, steps: int) -> dq.Statistics:
    """Statistics of a short real denoising run with guidance; the VAE only has to be there."""
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = DiTPipeline(model, vae, DDIMScheduler())
    calls = [dict(class_labels=[1], guidance_scale=1.5)]
    return dq.calibrate(pipe, calls, num_inference_steps=steps, seed=0)


def variants(arguments: argparse.Namespace, device: str) -> dict[str, torch.nn.Module]:
    full = transformer(arguments).to(device)
    measured = calibrated(full, steps=20)
    half = full.to(torch.bfloat16)
    models: dict[str, torch.nn.Module] = {"bf16": half}
    if device == "cpu":
        models["fp32"] = transformer(arguments)
    recipes = {
        "HTG W8A8 static": dq.DQConfig("htg", weight_bits=8),
        "RTN W8A8 dynamic": dq.DQConfig("rtn", weight_bits=8),
        "HTG W4A8 static": dq.DQConfig("htg", weight_bits=4),
    }
    for name, config in recipes.items():
        models[name] = copy.deepcopy(half)
        dq.quantize(models[name], config, statistics=measured)
    if arguments.compile:
        models = {name: torch.compile(model, fullgraph=True) for name, model in models.items()}
    return models


def step_inputs(arguments: argparse.Namespace, device: str, dtype: torch.dtype) -> dict[str, Any]:
    side = 2 * int(arguments.tokens**0.5)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(arguments.batch, 4, side, side, generator=generator)
    return dict(
        hidden_states=latents.to(device, dtype),
        timestep=torch.full((arguments.batch,), 500, device=device),
        class_labels=torch.arange(arguments.batch, device=device),
    )


@torch.inference_mode()
def measure(models: dict[str, torch.nn.Module], arguments: argparse.Namespace, device: str) -> dict[str, list[float]]:
    """Milliseconds of each round, by variant."""

    def run(name: str) -> float:
        inputs = step_inputs(arguments, device, torch.float32 if name == "fp32" else torch.bfloat16)
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        models[name](**inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    for name in models:
        for _ in range(3):
            run(name)
    times: dict[str, list[float]] = {name: [] for name in models}
    order = random.Random(0)
    for _ in range(arguments.rounds):
        for name in order.sample(sorted(models), len(models)):
            times[name].append(run(name))
    return times


def facts(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = {}
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        rows[name] = {
            "median_ms": medians[name],
            "quartile_low_ms": low,
            "quartile_high_ms": high,
            "times_bf16": medians["bf16"] / medians[name],
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="a square number")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, help="a JSON file (default: one in results/, named after the hardware)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    rows = summary(measure(variants(arguments, device), arguments, device))
    about = facts(arguments, device)
    mode = "compiled" if arguments.compile else "eager"
    print(f"\n{about['hardware']}, {about['threads']} threads, {mode}, {arguments.rounds} rounds interleaved")
    print(f"{arguments.layers} blocks of width {arguments.width}, batch {arguments.batch}, {arguments.tokens} tokens")
    print(f"{'variant':<20}{'median ms':>10}{'quartiles':>18}{'x bf16':>8}")
    for name, row in rows.items():
        quartiles = f"{row['quartile_low_ms']:.1f} - {row['quartile_high_ms']:.1f}"
        print(f"{name:<20}{row['median_ms']:>10.1f}{quartiles:>18}{row['times_bf16']:>8.2f}")
    slug = "-".join(about["hardware"].lower().replace("(r)", "").split())
    output = arguments.output or RESULTS / f"step-{slug}{'-compiled' if arguments.compile else ''}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
