# SPDX-License-Identifier: Apache-2.0
"""PixArt-Sigma calibrated and sampled by several GPUs: accelerate launch --num_processes 4 examples/multi_gpu.py

Each process calibrates on its share of the prompts. The statistics of all are merged, one process quantizes with them
and saves, and every process loads that pipeline and makes its share of the pictures. Prompts and pictures are seeded
by number, so the pictures are the same for any number of processes. A tiny model of random weights on CPUs, which
accelerate launches only through MPI: torchrun --nproc_per_node 2 examples/multi_gpu.py --tiny
"""

import argparse
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import diffusers_dq as dq

MODEL = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
CONFIG = dq.DQConfig("smoothquant", weight_bits=8, activation_bits=8)
CALIBRATION = [
    "a lighthouse on a cliff above a stormy sea, oil painting",
    "an isometric drawing of a small bakery, pastel colours",
    "a red fox asleep in fresh snow, macro photograph",
    "a street market in Marrakesh at night, long exposure",
    "a steam engine made of glass, studio lighting, white background",
    "an astronaut repairing a bicycle on the moon, film still",
]
PROMPTS = ["a corgi reading a newspaper in a cafe, photograph", "a paper-cut landscape of mountains at dawn"] * 4


def full_precision(tiny: bool) -> PixArtSigmaPipeline:
    if not tiny:
        return PixArtSigmaPipeline.from_pretrained(MODEL, dtype=torch.bfloat16)
    torch.manual_seed(0)
    letters = {letter: i for i, letter in enumerate(["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    of_letters = Tokenizer(models.BPE(letters, []))
    of_letters.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=of_letters, pad_token="<pad>")
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(letters), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    )
    sizes = dict(num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, caption_channels=32)
    transformer = PixArtTransformer2DModel(out_channels=8, num_layers=2, sample_size=8, **sizes)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    parts = (tokenizer, encoder.eval(), vae.eval(), transformer.eval(), DPMSolverMultistepScheduler())
    return PixArtSigmaPipeline(*parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("pixart-w8a8"), help="folder that all processes reach")
    parser.add_argument("--tiny", action="store_true", help="random weights, CPUs, seconds")
    arguments = parser.parse_args()
    output, tiny = arguments.output, arguments.tiny
    # The timeout is how long processes wait for the slowest, and for the one that quantizes.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))
    output.mkdir(parents=True, exist_ok=True)
    size = dict(height=1024, width=1024)
    if tiny:
        size = dict(height=16, width=16, use_resolution_binning=False, max_sequence_length=16)
    steps, rank, processes = 4 if tiny else 20, state.process_index, state.num_processes

    pipe = full_precision(tiny).to(state.device)
    first, last = (len(CALIBRATION) * (rank + i) // processes for i in (0, 1))
    calls = [dict(prompt=prompt, **size) for prompt in CALIBRATION[first:last]]
    if calls:  # there may be more processes than prompts
        path = part(output, rank, processes)
        dq.calibrate(pipe, calls, num_inference_steps=steps, seed=first, checkpoint=path, progress=rank == 0)
    state.wait_for_everyone()

    if state.is_main_process:
        parts = [part(output, i, processes) for i in range(processes)]
        statistics = dq.Statistics.merge([dq.Statistics.load(path) for path in parts if path.exists()])
        statistics.save(output / "statistics.safetensors")
        print(dq.quantize(pipe, CONFIG, statistics=statistics))
        pipe.save_pretrained(output / "pipeline")
    state.wait_for_everyone()

    dtype = pipe.transformer.dtype
    del pipe  # makes room for the next
    pipe = PixArtSigmaPipeline.from_pretrained(output / "pipeline", dtype=dtype).to(state.device)
    pipe.set_progress_bar_config(disable=True)
    for i in range(rank, len(PROMPTS), processes):
        generator = torch.Generator().manual_seed(1000 + i)
        pipe(PROMPTS[i], num_inference_steps=steps, generator=generator, **size).images[0].save(output / f"{i:04}.png")


def part(output: Path, rank: int, processes: int) -> Path:
    """Statistics of one share; an interrupted run of as many processes goes on from it."""
    return output / f"statistics-{rank}-of-{processes}.safetensors"


if __name__ == "__main__":
    main()
