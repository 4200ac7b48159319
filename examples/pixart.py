# SPDX-License-Identifier: Apache-2.0
"""PixArt-Sigma with 4-bit weights and 8-bit activations by ViDiT-Q: python examples/pixart.py --output pixart-w4a8

Calibrates on prompts, quantizes, saves, loads what was saved and compares it with full precision on other prompts.
`--tiny` is the same with a tiny model of random weights, without a GPU or a download.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import diffusers_dq as dq

MODEL = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
# Activations are rounded a token at run time. Cross-attention's keys and values, of text, stay as they are by default.
CONFIG = dq.DQConfig("viditq", weight_bits=4, activation_bits=8)
CALIBRATION = [
    "a lighthouse on a cliff above a stormy sea, oil painting",
    "portrait of an old fisherman, soft window light, 85 mm photograph",
    "an isometric drawing of a small bakery, pastel colours",
    "a red fox asleep in fresh snow, macro photograph",
    "a street market in Marrakesh at night, long exposure",
    "a steam engine made of glass, studio lighting, white background",
    "a watercolour of three sailing boats in a fjord",
    "an astronaut repairing a bicycle on the moon, film still",
]
HELD_OUT = ["a corgi reading a newspaper in a cafe, photograph", "a paper-cut landscape of mountains at dawn"]


def full_precision(tiny: bool) -> PixArtSigmaPipeline:
    if not tiny:
        return placed(PixArtSigmaPipeline.from_pretrained(MODEL, dtype=torch.bfloat16))
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


def placed(pipe: PixArtSigmaPipeline) -> PixArtSigmaPipeline:
    """On a GPU that need not hold the text encoder, of 4.7 billion parameters, and the transformer together."""
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    return pipe


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("pixart-w4a8"), help="folder for all that is written")
    parser.add_argument("--tiny", action="store_true", help="random weights, a CPU, seconds")
    parser.add_argument("--push", metavar="NAME/REPO", help="upload the quantized pipeline to the Hugging Face Hub")
    arguments = parser.parse_args(argv)
    output, tiny = arguments.output, arguments.tiny
    output.mkdir(parents=True, exist_ok=True)
    size = dict(height=1024, width=1024)
    if tiny:
        size = dict(height=16, width=16, use_resolution_binning=False, max_sequence_length=16)
    calibration, held_out = ([dict(prompt=p, **size) for p in prompts] for prompts in (CALIBRATION, HELD_OUT))
    steps = 4 if tiny else 20

    pipe = full_precision(tiny)
    path = output / "statistics.safetensors"  # an interrupted calibration goes on from here
    statistics = dq.calibrate(pipe, calibration, num_inference_steps=steps, checkpoint=path)
    pipe.remove_all_hooks()  # of offloading
    print(dq.quantize(pipe, CONFIG, statistics=statistics))
    pipe.save_pretrained(output / "pipeline")

    reference = full_precision(tiny)
    dtype = reference.transformer.dtype
    quantized = placed(PixArtSigmaPipeline.from_pretrained(output / "pipeline", dtype=dtype))
    comparison = dq.compare(reference, quantized, held_out, num_inference_steps=steps, seed=1000, layers=False)
    comparison.save(output / "comparison")
    print(f"to full precision: PSNR {comparison.mean_psnr:.1f} dB, SSIM {comparison.mean_ssim:.4f}")
    if arguments.push:
        original = None if tiny else MODEL
        dq.push_to_hub(quantized, arguments.push, comparison=comparison, base_model=original)


if __name__ == "__main__":
    main()
