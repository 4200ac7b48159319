#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train a small class-conditional DiT on CIFAR-10: the kind of model that lies in examples/dit-cifar10.

    python examples/train_dit_cifar10.py --data DATA --output OUT            # the defaults are the shipped settings
    python examples/train_dit_cifar10.py --data DATA --output OUT --resume   # after an interruption

Two stages, each with its own checkpoint under OUT/checkpoints (safetensors): an AutoencoderKL that turns a 32x32
picture into 4x16x16 latents, then a DiTTransformer2DModel that predicts the noise in them. OUT becomes a `DiTPipeline`
folder with samples.png (one class a row) and log.jsonl (loss by step). Everything random in a step is drawn from a
generator seeded with (seed, step), so on a CPU a resumed run gives the same weights as an uninterrupted one.

DATA holds train_jpeg.npz and test_jpeg.npz: `data` uint8, all JPEG files in a row; `offsets` int64 [n + 1],
image i is data[offsets[i]:offsets[i + 1]]; `labels` uint8 [n]. To make it from the "binary version" of the official
CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html; test_batch.bin for the test file):

    records = np.concatenate([np.fromfile(f, np.uint8).reshape(-1, 3073) for f in sorted(glob("data_batch_*.bin"))])
    files = []
    for pixels in records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1):
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG", quality=75)
        files.append(buffer.getvalue())
    np.savez("train_jpeg.npz", data=np.frombuffer(b"".join(files), np.uint8),
             offsets=np.cumsum([0, *map(len, files)]), labels=records[:, 0])
"""

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NULL_CLASS = 1000  # DiTPipeline has this number built in; the class table must have 1001 rows
LABEL_DROP = 0.1
# what --resume may change
NOT_SETTINGS = {"data", "output", "device", "resume", "checkpoint_every", "log_every", "sample_steps"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small class-conditional DiT on CIFAR-10.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train_jpeg.npz and test_jpeg.npz")
    add("--output", type=Path, required=True, help="folder for the pipeline, checkpoints, log and samples")
    add("--resume", action="store_true", help="go on from the checkpoints in --output")
    add("--vae-steps", type=int, default=2000)
    add("--vae-lr", type=float, default=2e-3, help="peak of the one-cycle schedule")
    add("--vae-channels", type=int, nargs=2, default=[24, 48], help="channels of the two levels, multiples of 8")
    add("--steps", type=int, default=12823, help="transformer steps")
    add("--lr", type=float, default=1e-3, help="falls to 0 over the last 40 percent of the steps")
    add("--ema", type=float, default=0.9995, help="decay of the averaged weights that are saved")
    add("--width", type=int, default=128)
    add("--heads", type=int, default=4)
    add("--depth", type=int, default=6)
    add("--batch-size", type=int, default=64)
    add("--seed", type=int, default=1)
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="transformer in bf16, fp32 master weights")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--checkpoint-every", type=int, default=500, help="steps between checkpoints")
    add("--log-every", type=int, default=100, help="steps that one logged loss is the mean of")
    add("--sample-steps", type=int, default=25, help="denoising steps of the pictures in samples.png")
    args = parser.parse_args(argv)
    for name in ("vae_steps", "steps", "width", "heads", "depth", "batch_size", "checkpoint_every", "log_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.width % args.heads:
        parser.error(f"--width must be a multiple of --heads, got {args.width} and {args.heads}")
    if any(channels < 8 or channels % 8 for channels in args.vae_channels):
        parser.error(f"--vae-channels must be multiples of 8, got {args.vae_channels}")
    return args


def load_images(path: Path) -> tuple[Tensor, Tensor]:
    """Pixels [n, 3, 32, 32] uint8 and labels [n] int64 of one npz file."""
    if not path.is_file():
        raise SystemExit(f"{path} not found: expected an npz with data, offsets and labels; see the top of {__file__}")
    with np.load(path) as file:
        if missing := {"data", "offsets", "labels"} - set(file.files):
            raise SystemExit(f"{path} lacks {sorted(missing)}; it has {sorted(file.files)}")
        data, offsets, labels = file["data"], file["offsets"], file["labels"]
    if len(offsets) != len(labels) + 1 or max(labels, default=0) >= len(CLASSES):
        raise SystemExit(f"{path}: expected labels 0 to 9 and one more offset, got {len(labels)} and {len(offsets)}")
    pixels = np.empty((len(labels), 32, 32, 3), np.uint8)
    for i in range(len(labels)):
        with Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())) as image:
            if image.size != (32, 32):
                raise SystemExit(f"{path}: image {i} is {image.size}, expected (32, 32)")
            pixels[i] = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()


def to_model_range(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def step_generator(args: argparse.Namespace, stage: int, step: int) -> torch.Generator:
    """The randomness of one step, whatever ran before it."""
    return torch.Generator().manual_seed((args.seed * 2 + stage) * 1_000_000_007 + step)


def one_cycle(progress: float) -> float:
    """Cosine from 1/25 to 1 over the first 30 percent, then cosine to 0. progress: 0 to 1."""
    if progress < 0.3:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * progress / 0.3)) / 2
    return (1 + math.cos(math.pi * (progress - 0.3) / 0.7)) / 2


def late_decay(progress: float) -> float:
    """1, then linear to 0 over the last 40 percent. progress: 0 to 1."""
    return min(1.0, (1 - progress) / 0.4)


class Training:
    """A module's weights with their EMA and AdamW state: what a checkpoint holds."""

    def __init__(self, stage: str, module: nn.Module, args: argparse.Namespace, weight_decay: float) -> None:
        self.stage = stage
        self.path = args.output / "checkpoints" / f"{stage}.safetensors"
        self.settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
        self.step = 0
        self.params = dict(module.named_parameters())  # a module shared between blocks appears once
        self.ema = {name: param.detach().clone() for name, param in self.params.items()}
        self.optimizer = torch.optim.AdamW(self.params.values(), weight_decay=weight_decay)

    def update(self, loss: Tensor, lr: float, decay: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        # the usual warm-up: without it a short run would average in its own initialization
        weight = 1 - min(decay, (1 + self.step) / (10 + self.step))
        for name, param in self.params.items():
            self.ema[name].lerp_(param.detach(), weight)
        self.step += 1

    def save(self) -> None:
        tensors = {f"ema.{name}": value for name, value in self.ema.items()}
        for name, param in self.params.items():
            tensors[f"weight.{name}"] = param.detach()
            tensors |= {f"adam.{key}.{name}": value for key, value in self.optimizer.state[param].items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        metadata = {"step": str(self.step), "settings": json.dumps(self.settings)}
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata)
        os.replace(partial, self.path)

    def load(self) -> None:
        with safe_open(self.path, "pt") as file:
            metadata = file.metadata()
            saved = json.loads(metadata["settings"])
            if changed := {k: (saved.get(k), v) for k, v in self.settings.items() if saved.get(k) != v}:
                raise SystemExit(f"{self.path} was made with other settings (saved, given): {changed}")
            self.step = int(metadata["step"])
            with torch.no_grad():
                for name, param in self.params.items():
                    param.copy_(file.get_tensor(f"weight.{name}"))
                    self.ema[name].copy_(file.get_tensor(f"ema.{name}"))
                    for key in ("step", "exp_avg", "exp_avg_sq"):
                        value = file.get_tensor(f"adam.{key}.{name}")
                        # AdamW keeps its step counts on the CPU, wherever the weights are
                        self.optimizer.state[param][key] = value if key == "step" else value.to(param.device)

    def use_ema(self) -> None:
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(self.ema[name])


def fit(
    state: Training,
    args: argparse.Namespace,
    loss_at: Callable[[int], Tensor],
    lr_at: Callable[[float], float],
    steps: int,
    decay: float,
) -> None:
    """Take `state` to `steps`, with a checkpoint now and then and at the end, and leave the EMA in the module.

    loss_at: of a step.   lr_at: of the progress, 0 to 1.   decay: of the EMA.
    """
    if args.resume and state.path.exists():
        state.load()
    total, count = torch.zeros((), device=args.device), 0
    progress = tqdm(total=steps, initial=state.step, desc=state.stage, mininterval=1)
    while state.step < steps:
        loss = loss_at(state.step)
        state.update(loss, lr_at(state.step / steps), decay)
        total, count = total + loss.detach(), count + 1
        progress.update()
        if state.step % args.log_every == 0 or state.step == steps:
            mean = (total / count).item()
            if not math.isfinite(mean):
                raise SystemExit(f"{state.stage}: the loss is {mean} at step {state.step}; try a lower learning rate")
            progress.set_postfix(loss=f"{mean:.4f}")
            with (args.output / "log.jsonl").open("a") as log:
                log.write(json.dumps({"stage": state.stage, "step": state.step, "loss": round(mean, 6)}) + "\n")
            total, count = torch.zeros_like(total), 0
        if state.step % args.checkpoint_every == 0 or state.step == steps:
            state.save()
    progress.close()
    state.use_ema()


def build_vae(args: argparse.Namespace) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=tuple(args.vae_channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=32,
    )


def train_vae(args: argparse.Namespace, pixels: Tensor) -> AutoencoderKL:
    """MSE + 0.2 L1 + 1e-6 KL, KL summed over a picture's latents."""
    torch.manual_seed(args.seed)
    # channels_last takes a third less time on a CPU
    vae = build_vae(args).to(args.device, memory_format=torch.channels_last)

    def loss_at(step: int) -> Tensor:
        generator = step_generator(args, 0, step)
        batch = pixels[torch.randint(len(pixels), (args.batch_size,), generator=generator)]
        images = to_model_range(batch).to(args.device)
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(args.device)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        kl: Tensor = posterior.kl().mean()
        return F.mse_loss(output, images) + 0.2 * F.l1_loss(output, images) + 1e-6 * kl

    state = Training("vae", vae, args, weight_decay=0.01)
    fit(state, args, loss_at, lambda t: args.vae_lr * one_cycle(t), args.vae_steps, decay=0.0)
    return vae.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor, device: str) -> Tensor:
    """Posterior means [n, 4, 16, 16]."""
    batches = tqdm(pixels.split(256), desc="latents", mininterval=1)
    return torch.cat([vae.encode(to_model_range(batch).to(device)).latent_dist.mean for batch in batches])


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pixels: Tensor, device: str) -> float:
    """Decibels over all pixels, through the posterior mean."""
    total = 0.0
    for batch in pixels.split(256):
        images = to_model_range(batch).to(device)
        output = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        total += ((output - images) / 2).square().sum().item()
    return -10 * math.log10(total / pixels.numel())


def build_transformer(args: argparse.Namespace) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=args.heads,
        attention_head_dim=args.width // args.heads,
        in_channels=4,
        out_channels=4,
        num_layers=args.depth,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )


@torch.no_grad()
def prepare_transformer(transformer: DiTTransformer2DModel, device: str) -> None:
    """The DiT paper's initialization (adaLN-zero, zero output) and one embedder for all blocks."""
    embedder = transformer.transformer_blocks[0].norm1.emb
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name in ("timestep_embedder.linear_1", "timestep_embedder.linear_2", "class_embedder.embedding_table"):
        nn.init.normal_(embedder.get_submodule(name).weight, std=0.02)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        block.norm1.emb = embedder
        if device == "cpu":
            # the fused attention's backward pass is slow on a CPU
            block.attn1.set_processor(AttnProcessor())
    for module in (transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(module.weight)
    # every block would draw for itself which labels to drop, so a picture would hardly ever lose its label
    embedder.class_embedder.dropout_prob = 0.0


def train_transformer(
    args: argparse.Namespace, latents: Tensor, labels: Tensor, scheduler: DDIMScheduler
) -> DiTTransformer2DModel:
    """Noise prediction. latents: [2, n, 4, 16, 16], scaled, of the pictures and of their mirror images."""
    torch.manual_seed(args.seed)
    transformer = build_transformer(args).to(args.device)
    prepare_transformer(transformer, torch.device(args.device).type)
    autocast = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)

    def loss_at(step: int) -> Tensor:
        generator, size = step_generator(args, 1, step), (args.batch_size,)
        index = torch.randint(len(labels), size, generator=generator)
        flip = torch.randint(2, size, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, size, generator=generator).to(args.device)
        noise = torch.randn((args.batch_size, *latents.shape[2:]), generator=generator).to(args.device)
        dropped = torch.rand(size, generator=generator) < LABEL_DROP
        classes = labels[index].masked_fill(dropped, NULL_CLASS).to(args.device)
        noisy = scheduler.add_noise(latents[flip.to(latents.device), index.to(latents.device)], noise, timesteps)
        with autocast:
            output = transformer(noisy, timestep=timesteps, class_labels=classes).sample
        return F.mse_loss(output.float(), noise)

    state = Training("transformer", transformer, args, weight_decay=0.0)
    fit(state, args, loss_at, lambda t: args.lr * late_decay(t), args.steps, args.ema)
    stored = build_transformer(args)
    stored.load_state_dict(transformer.state_dict())  # the class keeps a copy of the embedder for each block
    return stored.to(args.device).eval()


def save_samples(pipeline: DiTPipeline, path: Path, steps: int, seed: int, columns: int = 8) -> None:
    pipeline.set_progress_bar_config(disable=True)
    classes = [label for label in range(len(CLASSES)) for _ in range(columns)]
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(classes, guidance_scale=1.5, num_inference_steps=steps, generator=generator).images
    make_image_grid([image.resize((64, 64)) for image in images], len(CLASSES), columns).save(path)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    checkpoints = sorted((args.output / "checkpoints").glob("*.safetensors"))
    if checkpoints and not args.resume:
        raise SystemExit(f"{checkpoints[0]} exists: pass --resume to go on from it, or another --output")
    (pixels, labels), (test_pixels, _) = (load_images(args.data / f"{part}_jpeg.npz") for part in ("train", "test"))
    args.output.mkdir(parents=True, exist_ok=True)

    vae = train_vae(args, pixels)
    tqdm.write(f"VAE: {reconstruction_psnr(vae, test_pixels, args.device):.1f} dB on the test images", file=sys.stderr)
    latents = torch.stack([encode(vae, images, args.device) for images in (pixels, pixels.flip(-1))])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    latents.mul_(vae.config.scaling_factor)

    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    transformer = train_transformer(args, latents, labels, scheduler)
    pipeline = DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler)
    pipeline.register_to_config(id2label={str(i): name for i, name in enumerate(CLASSES)})
    pipeline.save_pretrained(args.output)
    save_samples(pipeline, args.output / "samples.png", args.sample_steps, args.seed)
    tqdm.write(f"saved {args.output}; look at {args.output / 'samples.png'}", file=sys.stderr)


if __name__ == "__main__":
    main()
