# SPDX-License-Identifier: Apache-2.0
"""The cards of the demo models: python hub_cards/generate.py [--measure]

Renders hub_cards/*/card.json; --measure makes those first: calibrates and quantizes examples/dit-cifar10 and compares
it with full precision, in minutes a model.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffusers import DiTPipeline

import diffusers_dq as dq
from diffusers_dq.cards import GRID, Card, make_card
from diffusers_dq.hub import original

HERE = Path(__file__).parent
MODEL = HERE.parent / "examples" / "dit-cifar10"
OWNER = "diffusers-dq"
STEPS = 25
CALIBRATION = [dict(class_labels=[i % 10 for i in range(32)], guidance_scale=1.5)]
HELD_OUT = [dict(class_labels=list(range(8)), guidance_scale=1.5)]
EXAMPLE = dict(class_labels=[8], guidance_scale=1.5, num_inference_steps=STEPS)
NOTE = (
    "A demo: a small class-conditional DiT trained on CIFAR-10, which is in `examples/dit-cifar10` of diffusers_dq,"
    " with a card of its own. It is there to try out and test quantization, not to make good pictures."
)
RECIPES = {
    "htg-w8a8": dict(method="htg", weight_bits=8, activation_bits=8),
    "htg-w4a8": dict(method="htg", weight_bits=4, activation_bits=8),
    "quality-w8a8": dict(preset="quality", weight_bits=8, activation_bits=8),
    "quality-w4a8": dict(preset="quality", weight_bits=4, activation_bits=8),
}


def folder_of(name: str) -> Path:
    return HERE / f"dit-cifar10-{name}"


def calibrated() -> dq.Statistics:
    return dq.calibrate(DiTPipeline.from_pretrained(MODEL), CALIBRATION, num_inference_steps=STEPS, seed=0)


def measured(name: str, statistics: dq.Statistics) -> tuple[Card, dq.Comparison]:
    reference, pipe = DiTPipeline.from_pretrained(MODEL), DiTPipeline.from_pretrained(MODEL)
    dq.quantize(pipe, dq.DQConfig(**RECIPES[name]), statistics=statistics)  # type: ignore[arg-type]
    comparison = dq.compare(reference, pipe, HELD_OUT, num_inference_steps=STEPS, seed=1000)
    with tempfile.TemporaryDirectory() as folder:
        pipe.transformer.save_pretrained(folder)
        size = sum(os.path.getsize(file) for file in Path(folder).glob("*.safetensors"))
    card = make_card(
        pipe,
        f"{OWNER}/dit-cifar10-{name}",
        comparison=comparison,
        statistics={"transformer": statistics},
        call=EXAMPLE,
        base=original(pipe),
        file_bytes={"transformer": size},
    )
    return replace(card, notes=[NOTE]), comparison


def write(name: str, card: Card, comparison: dq.Comparison) -> None:
    picture = folder_of(name) / GRID
    picture.parent.mkdir(parents=True, exist_ok=True)
    comparison.grid().save(picture, optimize=True)
    text = json.dumps(card.to_dict(), indent=1, ensure_ascii=False)
    (folder_of(name) / "card.json").write_text(text + "\n", encoding="utf-8")


def rendered(name: str) -> str:
    """The card, from card.json alone."""
    return Card(**json.loads((folder_of(name) / "card.json").read_text(encoding="utf-8"))).render()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="calibrate, quantize and compare anew")
    if parser.parse_args(argv).measure:
        statistics = calibrated()
        for name in RECIPES:
            write(name, *measured(name, statistics))
    for name in RECIPES:
        (folder_of(name) / "README.md").write_text(rendered(name), encoding="utf-8")
        print(folder_of(name) / "README.md")


if __name__ == "__main__":
    main()
