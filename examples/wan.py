# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1's 1.3B text-to-video model in 8 bits by HTG: python examples/wan.py --output wan-w8a8

Calibrates on prompts, quantizes, saves, loads what was saved and compares the frames with full precision on another
prompt. `--tiny` is the same with a tiny model of random weights, without a GPU or a download.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

import diffusers_dq as dq

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
CONFIG = dq.DQConfig("htg", weight_bits=8, activation_bits=8)
CALIBRATION = [
    "A cat in sunglasses rides a skateboard down a hill, the camera follows.",
    "Waves break on black rocks in slow motion, overcast sky.",
    "A potter's hands shape a bowl on a turning wheel, close-up.",
    "A night train passes through a snowy station, people wait.",
]
HELD_OUT = ["A hot-air balloon rises over a valley in the morning mist, aerial view."]
NEGATIVE = "blurred, static, overexposed, watermark, deformed hands, worst quality"


def full_precision(tiny: bool) -> WanPipeline:
    if not tiny:
        vae = AutoencoderKLWan.from_pretrained(MODEL, subfolder="vae", dtype=torch.float32)
        return WanPipeline.from_pretrained(MODEL, vae=vae, dtype=torch.bfloat16)
    torch.manual_seed(0)
    letters = {letter: i for i, letter in enumerate(["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    of_letters = Tokenizer(models.BPE(letters, []))
    of_letters.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=of_letters, pad_token="<pad>")
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(letters), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    )
    sizes = dict(num_attention_heads=2, attention_head_dim=16, text_dim=32, freq_dim=32, ffn_dim=64)
    transformer = WanTransformer3DModel(num_layers=2, rope_max_seq_len=32, **sizes)
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(tokenizer, encoder.eval(), vae.eval(), scheduler, transformer.eval())


def offloaded(pipe: WanPipeline) -> WanPipeline:
    """One part at a time on the GPU: the text encoder is four times the transformer."""
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    return pipe


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("wan-w8a8"), help="folder for all that is written")
    parser.add_argument("--tiny", action="store_true", help="random weights, a CPU, seconds")
    parser.add_argument("--push", metavar="NAME/REPO", help="upload the quantized pipeline to the Hugging Face Hub")
    arguments = parser.parse_args(argv)
    output, tiny = arguments.output, arguments.tiny
    output.mkdir(parents=True, exist_ok=True)
    # Two seconds of video, not five, to save time: a clip of 33 frames has 14,040 tokens a step to learn ranges from.
    size = dict(height=480, width=832, num_frames=33)
    if tiny:
        size = dict(height=32, width=32, num_frames=9, max_sequence_length=16)
    settings = dict(negative_prompt=NEGATIVE, guidance_scale=5.0, **size)
    calibration, held_out = ([dict(prompt=p, **settings) for p in prompts] for prompts in (CALIBRATION, HELD_OUT))
    steps = 4 if tiny else 30

    pipe = offloaded(full_precision(tiny))
    path = output / "statistics.safetensors"  # an interrupted calibration goes on from here
    statistics = dq.calibrate(pipe, calibration, num_inference_steps=steps, checkpoint=path)
    pipe.remove_all_hooks()  # of offloading: the transformer is back in RAM
    print(dq.quantize(pipe, CONFIG, statistics=statistics))
    pipe.save_pretrained(output / "pipeline")

    # The VAE is given, for all parts of a pipeline are loaded in one dtype and it keeps fp32.
    dtype = pipe.transformer.dtype
    quantized = offloaded(WanPipeline.from_pretrained(output / "pipeline", vae=pipe.vae, dtype=dtype))
    reference = offloaded(full_precision(tiny))
    comparison = dq.compare(reference, quantized, held_out, num_inference_steps=steps, seed=1000, layers=False)
    comparison.save(output / "comparison")
    print(f"to full precision, a frame: PSNR {comparison.mean_psnr:.1f} dB, SSIM {comparison.mean_ssim:.4f}")
    if arguments.push:
        original = None if tiny else MODEL
        dq.push_to_hub(quantized, arguments.push, comparison=comparison, base_model=original)


if __name__ == "__main__":
    main()
