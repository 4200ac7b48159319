# SPDX-License-Identifier: Apache-2.0
"""DiT-XL/2 with 4-bit weights and 8-bit activations by HTG: python examples/dit.py --output dit-w4a8

Calibrates over the sampler's steps, quantizes, saves, loads what was saved and compares it with full precision on
other classes and noise. `--tiny` is the same with a tiny model of random weights, without a GPU or a download.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import diffusers_dq as dq

MODEL = "facebook/DiT-XL-2-256"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = dq.DQConfig("htg", weight_bits=4, activation_bits=8)
# 32 of the 1000 classes, guided as the pictures to come will be: calibrate on what the model is for.
CALIBRATION = [dict(class_labels=list(range(first, 1000, 125)), guidance_scale=1.5) for first in (0, 31, 62, 93)]
HELD_OUT = [dict(class_labels=[88, 207, 279, 360, 387, 417, 974, 979], guidance_scale=1.5)]


def full_precision(tiny: bool) -> DiTPipeline:
    if not tiny:
        return DiTPipeline.from_pretrained(MODEL, dtype=torch.bfloat16).to(DEVICE)
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=16
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    return DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("dit-w4a8"), help="folder for all that is written")
    parser.add_argument("--tiny", action="store_true", help="random weights, a CPU, seconds")
    parser.add_argument("--push", metavar="NAME/REPO", help="upload the quantized pipeline to the Hugging Face Hub")
    arguments = parser.parse_args(argv)
    output, steps = arguments.output, 20 if arguments.tiny else 100
    output.mkdir(parents=True, exist_ok=True)

    pipe = full_precision(arguments.tiny)
    path = output / "statistics.safetensors"  # an interrupted calibration goes on from here
    statistics = dq.calibrate(pipe, CALIBRATION, num_inference_steps=steps, seed=0, checkpoint=path)
    print(dq.quantize(pipe, CONFIG, statistics=statistics))
    pipe.save_pretrained(output / "pipeline")

    dtype = pipe.transformer.dtype
    quantized = DiTPipeline.from_pretrained(output / "pipeline", dtype=dtype).to(pipe.device)
    # Half of the steps that were calibrated: groups go by the timestep's value, not by its number.
    comparison = dq.compare(
        full_precision(arguments.tiny), quantized, HELD_OUT, num_inference_steps=steps // 2, seed=1000
    )
    comparison.save(output / "comparison")
    print(f"to full precision: PSNR {comparison.mean_psnr:.1f} dB, SSIM {comparison.mean_ssim:.4f}")
    for name, decibels in comparison.worst_layers(3):
        print(f"least accurate: {name}, {decibels:.1f} dB")
    if arguments.push:
        original = None if arguments.tiny else MODEL
        dq.push_to_hub(quantized, arguments.push, comparison=comparison, base_model=original)


if __name__ == "__main__":
    main()
