# SPDX-License-Identifier: Apache-2.0
"""FLUX.1-dev with 4-bit weights and 8-bit activations: python examples/flux.py --output flux-w4a8

Calibrates on prompts, quantizes, saves, loads what was saved and compares it with full precision on another prompt.
The transformer has 12 billion parameters, 24 GB in bf16: one part at a time is on the GPU, and it is quantized in RAM.
`--tiny` is the same with a tiny model of random weights, without a GPU or a download.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

import diffusers_dq as dq

MODEL = "black-forest-labs/FLUX.1-dev"
# Channels are scaled so that outliers move into the weights, which get a scale for every 64 inputs.
CONFIG = dq.DQConfig("smoothquant", weight_bits=4, activation_bits=8, group_size=64)
CALIBRATION = [
    "a tiny astronaut hatching from an egg on the moon, cinematic light",
    "close-up of a chameleon on a wet leaf, macro photograph",
    'a shop window with the words "open all night" in red neon, rain',
    "an old library with a spiral staircase, watercolour",
]
HELD_OUT = ['a wooden sign that reads "quantized" on a mountain path at sunrise, photograph']


def full_precision(tiny: bool) -> FluxPipeline:
    if not tiny:
        return FluxPipeline.from_pretrained(MODEL, dtype=torch.bfloat16)
    torch.manual_seed(0)
    letters = {letter: i for i, letter in enumerate(["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    of_letters = Tokenizer(models.BPE(letters, []))
    of_letters.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=of_letters, pad_token="<pad>", model_max_length=16)
    width = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=len(letters), max_position_embeddings=16, **width))
    t5 = T5EncoderModel(T5Config(vocab_size=len(letters), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2))
    sizes = dict(attention_head_dim=32, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, guidance_embeds=True, axes_dims_rope=(8, 12, 12), **sizes
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, shift_factor=0.1)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(scheduler, vae.eval(), clip.eval(), tokenizer, t5.eval(), tokenizer, transformer.eval())


def offloaded(pipe: FluxPipeline) -> FluxPipeline:
    """One part at a time on the GPU; below the transformer's size, group offloading goes further."""
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    return pipe


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("flux-w4a8"), help="folder for all that is written")
    parser.add_argument("--tiny", action="store_true", help="random weights, a CPU, seconds")
    parser.add_argument("--push", metavar="NAME/REPO", help="upload the quantized pipeline to the Hugging Face Hub")
    arguments = parser.parse_args(argv)
    output, tiny = arguments.output, arguments.tiny
    output.mkdir(parents=True, exist_ok=True)
    side, tokens, steps = (16, 16, 4) if tiny else (1024, 512, 28)
    settings = dict(height=side, width=side, guidance_scale=3.5, max_sequence_length=tokens)
    calibration, held_out = ([dict(prompt=p, **settings) for p in prompts] for prompts in (CALIBRATION, HELD_OUT))

    pipe = offloaded(full_precision(tiny))
    path = output / "statistics.safetensors"  # an interrupted calibration goes on from here
    statistics = dq.calibrate(pipe, calibration, num_inference_steps=steps, checkpoint=path)
    pipe.remove_all_hooks()  # of offloading: the transformer is back in RAM
    print(dq.quantize(pipe, CONFIG, statistics=statistics))
    pipe.save_pretrained(output / "pipeline")

    dtype = pipe.transformer.dtype
    del pipe
    quantized = offloaded(FluxPipeline.from_pretrained(output / "pipeline", dtype=dtype))
    reference = offloaded(full_precision(tiny))
    comparison = dq.compare(reference, quantized, held_out, num_inference_steps=steps, seed=1000, layers=False)
    comparison.save(output / "comparison")
    print(f"to full precision: PSNR {comparison.mean_psnr:.1f} dB, SSIM {comparison.mean_ssim:.4f}")
    if arguments.push:
        original = None if tiny else MODEL
        dq.push_to_hub(quantized, arguments.push, comparison=comparison, base_model=original)


if __name__ == "__main__":
    main()
