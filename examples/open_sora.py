# SPDX-License-Identifier: Apache-2.0
"""Open-Sora with 4-bit weights and 8-bit activations by ViDiT-Q: python examples/open_sora.py --output open-sora-w4a8

Reads a published checkpoint, calibrates, quantizes, saves, loads what was saved and compares it with full precision on
another prompt: of version 1.2 the latents, as diffusers lacks its VAE. `--tiny` has random weights and no download.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

import diffusers_dq as dq
from diffusers_dq import opensora
from diffusers_dq.denoise import run_call

TEXT_ENCODER, VAE = "DeepFloyd/t5-v1_1-xxl", "stabilityai/sd-vae-ft-ema"
CHECKPOINTS: dict[str, Any] = {
    "1.0": dict(source="hpcai-tech/Open-Sora", filename="OpenSora-v1-HQ-16x512x512.pth"),
    "1.2": dict(source="hpcai-tech/OpenSora-STDiT-v3"),
}
CONFIG = dq.DQConfig("viditq", weight_bits=4, activation_bits=8)
CALIBRATION = [
    "A drone circles a lighthouse above a stormy sea, white foam on the rocks.",
    "Lanterns drift over a river at night, reflected in the water.",
]
HELD_OUT = ["Clouds pass over a field of sunflowers, time lapse."]


def full_precision(version: str, tiny: bool) -> Any:
    if tiny:
        torch.manual_seed(0)
        letters = {letter: i for i, letter in enumerate(["<pad>", *pre_tokenizers.ByteLevel.alphabet()])}
        of_letters = Tokenizer(models.BPE(letters, []))
        of_letters.pre_tokenizer = pre_tokenizers.ByteLevel()
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=of_letters, pad_token="<pad>")
        encoder = T5EncoderModel(T5Config(vocab_size=257, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2))
        sizes = dict(num_attention_heads=2, attention_head_dim=16, caption_channels=32, caption_length=16)
        kind: Any = opensora.STDiTTransformer3DModel if version == "1.0" else opensora.STDiT3Transformer3DModel
        model, vae = kind(num_layers=2, **sizes), AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    else:
        tokenizer = AutoTokenizer.from_pretrained(TEXT_ENCODER)
        encoder = T5EncoderModel.from_pretrained(TEXT_ENCODER, dtype=torch.bfloat16)
        model = opensora.load_open_sora(**CHECKPOINTS[version], dtype=torch.bfloat16)
        vae = AutoencoderKL.from_pretrained(VAE, dtype=torch.bfloat16)
    parts: Any = [tokenizer, encoder.eval(), vae.eval() if version == "1.0" else None, model.eval()]
    if version == "1.0":
        return opensora.OpenSoraPipeline(*parts, scheduler=opensora.iddpm_scheduler())
    return opensora.OpenSora12Pipeline(*parts, scheduler=opensora.rectified_flow_scheduler())


def placed(pipe: Any) -> Any:
    """One part at a time on the GPU: the text encoder is six times the transformer."""
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    return pipe


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", choices=sorted(CHECKPOINTS), default="1.0", help="of Open-Sora")
    parser.add_argument("--output", type=Path, default=Path("open-sora-w4a8"), help="folder for all that is written")
    parser.add_argument("--tiny", action="store_true", help="random weights, a CPU, seconds")
    parser.add_argument("--push", metavar="NAME/REPO", help="upload the quantized pipeline to the Hugging Face Hub")
    arguments = parser.parse_args(argv)
    version, output, tiny = arguments.version, arguments.output, arguments.tiny
    output.mkdir(parents=True, exist_ok=True)
    size: Any = dict(num_frames=16, height=512, width=512) if version == "1.0" else dict(output_type="latent")
    size |= dict(num_frames=17, height=16, width=16) if tiny else {}
    calibration, held_out = ([dict(prompt=p, **size) for p in prompts] for prompts in (CALIBRATION, HELD_OUT))
    run: dict[str, Any] = dict(num_inference_steps=3 if tiny else 100 if version == "1.0" else 30)

    pipe = placed(full_precision(version, tiny))
    statistics = dq.calibrate(pipe, calibration, **run, checkpoint=output / f"statistics-{version}.safetensors")
    pipe.remove_all_hooks()  # of offloading
    print(dq.quantize(pipe, CONFIG, statistics=statistics))
    pipe.save_pretrained(output / "pipeline")

    reference = placed(full_precision(version, tiny))
    quantized = placed(type(pipe).from_pretrained(output / "pipeline", dtype=pipe.transformer.dtype))
    comparison = None
    if version == "1.0":
        comparison = dq.compare(reference, quantized, held_out, **run, seed=1000, layers=False)
        comparison.save(output / "comparison")
        print(f"first frames: PSNR {comparison.mean_psnr:.1f} dB, SSIM {comparison.mean_ssim:.4f}")
    x, y = (run_call(p, {**held_out[0], "output_type": "latent"}, **run, seed=1000) for p in (reference, quantized))
    print(f"latents to full precision: SNR {20 * float((x.norm() / (x - y).norm()).log10()):.1f} dB")
    if arguments.push:
        original = None if tiny else CHECKPOINTS[version]["source"]
        dq.push_to_hub(quantized, arguments.push, comparison=comparison, base_model=original)


if __name__ == "__main__":
    main()
