# SPDX-License-Identifier: Apache-2.0
"""Full precision and quantized side by side, in a browser: python examples/space_app.py

Both make the same pictures from the same seed, and the page says how far apart they are and how long each took. By
default the package's demo model, quantized when the page starts; `--reference MODEL --quantized MODEL` takes two saved
class-conditional or text-to-image pipelines, folders or names on the Hub. Also the app.py of a Space: examples/space.

Needs gradio: pip install 'diffusers-dq[space]'
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

import diffusers_dq as dq
from diffusers_dq.commands.demo import MODEL
from diffusers_dq.denoise import quiet, run_call
from diffusers_dq.evaluation import psnr, ssim
from diffusers_dq.evaluation.loading import class_labels
from diffusers_dq.opensora.loading import pipeline_class

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST_PICTURES = 8


@dataclass(frozen=True)
class Pair:
    """Two pipelines that make the same picture of the same seed.   labels: the classes' names; () for prompts."""

    reference: DiffusionPipeline
    quantized: DiffusionPipeline
    title: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shown:
    """reference, quantized, difference: n pictures [H, W, 3] uint8 each.   summary: Markdown."""

    reference: list[np.ndarray]
    quantized: list[np.ndarray]
    difference: list[np.ndarray]
    summary: str


def demo_pair(method: str = "htg", weight_bits: int = 4, calibration_steps: int = 25) -> Pair:
    """The demo model and a quantized copy of it."""
    reference, quantized = load(str(MODEL)), load(str(MODEL))
    calls = [dict(class_labels=list(range(10)), guidance_scale=1.5)]
    statistics = dq.calibrate(quantized, calls, num_inference_steps=calibration_steps, progress=False)
    config = dq.DQConfig(method, weight_bits=weight_bits, activation_bits=8)
    dq.quantize(quantized, config, statistics=statistics, progress=False)
    return Pair(reference, quantized, f"{method.upper()} W{weight_bits}A8 of a DiT for CIFAR-10", names_of(reference))


def saved_pair(reference: str, quantized: str) -> Pair:
    pipe = load(reference)
    return Pair(pipe, load(quantized), f"{quantized} beside {reference}", names_of(pipe))


def load(model: str) -> DiffusionPipeline:
    return pipeline_class(model).from_pretrained(model).to(DEVICE)


def names_of(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """Of the classes, in the order of their numbers, which stand for names that the pipeline does not give; () for a
    pipeline that takes prompts."""
    named: dict[str, int] = getattr(pipe, "labels", None) or {}
    first: dict[int, str] = {}
    for name, number in named.items():
        first.setdefault(number, name)
    return tuple(first.get(number, str(number)) for number in class_labels(pipe, None))


def side_by_side(pair: Pair, what: str, *, seed: int, steps: int, pictures: int = 4, guidance: float = 1.5) -> Shown:
    """what: the name of a class, or a prompt.

    Raises ValueError for a class that the model does not have, or numbers that cannot be.
    """
    if pair.labels and what not in pair.labels:
        raise ValueError(f"{what!r} is no class of this model; it has {', '.join(pair.labels)}")
    if steps < 1 or not 1 <= pictures <= MOST_PICTURES or not 0 <= seed < 2**63:
        raise ValueError(
            f"expected a seed from 0 to 2^63 - 1, steps from 1 and 1 to {MOST_PICTURES} pictures,"
            f" got {seed}, {steps}, {pictures}"
        )
    given: dict[str, Any] = {"prompt": [what] * pictures}
    if pair.labels:
        given = {"class_labels": [pair.labels.index(what)] * pictures}
    call = given | {"guidance_scale": guidance}
    images, seconds = [], []
    for pipe in (pair.reference, pair.quantized):
        with quiet(pipe):
            start = time.perf_counter()
            images.append(run_call(pipe, call, num_inference_steps=steps, seed=seed, output_type="np"))
            seconds.append(time.perf_counter() - start)
    x, y = images
    gain = min(64, 1 << int(np.log2(1 / max(float(np.quantile(abs(x - y), 0.99)), 1 / 64))))
    summary = (
        f"PSNR **{psnr(x, y).mean():.1f} dB**, SSIM **{ssim(x, y).mean():.4f}**, difference x {gain}"
        f" · full precision {seconds[0]:.2f} s, quantized {seconds[1]:.2f} s"
    )
    return Shown(_bytes(x), _bytes(y), _bytes(abs(x - y) * gain), summary)


def _bytes(images: np.ndarray) -> list[np.ndarray]:
    """Small pictures enlarged, each pixel a square: browsers would blur them."""
    factor = max(1, 128 // max(images.shape[1:3]))
    pixels = (images.clip(0, 1) * 255).round().astype(np.uint8)
    return list(pixels.repeat(factor, axis=1).repeat(factor, axis=2))


def gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise SystemExit("this page needs gradio, which is not here: pip install 'diffusers-dq[space]'") from error
    return gradio


def build(pair: Pair) -> Any:
    """The page, a gradio Blocks."""
    gr = gradio()

    def show(what: str, seed: float | None, steps: float, pictures: float, guidance: float) -> tuple[Any, ...]:
        try:
            if seed is None:
                raise ValueError("the seed is empty: expected a whole number from 0")
            shown = side_by_side(
                pair, what, seed=int(seed), steps=int(steps), pictures=int(pictures), guidance=guidance
            )
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return shown.reference, shown.quantized, shown.difference, shown.summary

    hour = 3600  # pictures are files of the server: without an end they would fill its disk
    with gr.Blocks(title="diffusers_dq", analytics_enabled=False, delete_cache=(hour, hour)) as page:
        gr.Markdown(f"# Full precision and quantized\n{pair.title}: the same seed in both.")
        with gr.Row():
            if pair.labels:
                what = gr.Dropdown(list(pair.labels), value=pair.labels[0], label="class")
            else:
                what = gr.Textbox("a lighthouse in a storm", label="prompt")
            seed = gr.Number(0, label="seed", precision=0, minimum=0)
            steps = gr.Slider(1, 100, value=20, step=1, label="denoising steps")
            pictures = gr.Slider(1, MOST_PICTURES, value=4, step=1, label="pictures")
            guidance = gr.Slider(1, 10, value=1.5, step=0.1, label="guidance")
        button = gr.Button("Generate", variant="primary")
        summary = gr.Markdown()
        with gr.Row():
            galleries = [
                gr.Gallery(label=label, format="png", columns=2, object_fit="contain", height=420)  # exact: no loss
                for label in ("full precision", "quantized", "difference")
            ]
        inputs, outputs = [what, seed, steps, pictures, guidance], [*galleries, summary]
        button.click(show, inputs, outputs)
        steps.release(show, inputs, outputs)
        page.load(show, inputs, outputs)
    return page


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", metavar="MODEL", help="in full precision; by default the demo model")
    parser.add_argument("--quantized", metavar="MODEL", help="the same model, saved by diffusers_dq")
    parser.add_argument("--method", default="htg", help="of the demo model: a name of dq.methods()")
    parser.add_argument("--weight-bits", type=int, default=4, help="of the demo model")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    arguments = parser.parse_args(argv)
    if bool(arguments.reference) != bool(arguments.quantized):
        parser.error("--reference and --quantized go together")
    gradio()  # what is missing is said before a model is loaded
    if arguments.reference:
        pair = saved_pair(arguments.reference, arguments.quantized)
    else:
        pair = demo_pair(arguments.method, arguments.weight_bits)
    build(pair).launch(server_port=arguments.port)


if __name__ == "__main__":
    main()
