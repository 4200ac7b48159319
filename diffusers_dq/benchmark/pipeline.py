# SPDX-License-Identifier: Apache-2.0
"""A whole DiT pipeline: guidance, scheduler and transformer, with a VAE of no weight. Latents a second."""

from contextlib import nullcontext
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from diffusers_dq.benchmark.compiling import Compiled
from diffusers_dq.benchmark.models import Case
from diffusers_dq.benchmark.session import Part
from diffusers_dq.benchmark.settings import Settings
from diffusers_dq.benchmark.stage import BOTH, Stage, make_source
from diffusers_dq.benchmark.timing import Call
from diffusers_dq.benchmark.variants import NOTE, Variant, throwaway_pipeline, variants_of

CONTESTANTS = ("bf16", "HTG W8A8 static", "HTG W4A8 static")
_NOTE = f"{NOTE}; no CUDA graphs for any contestant; its VAE has 8 channels, so the rate is that of latents"


def pipeline_part(case: Case, steps: int) -> Part:
    """steps: denoising steps of a picture.   Raises ValueError for a model without a pipeline here."""
    if case.family != "dit":
        raise ValueError(f"the pipeline benchmark knows DiT (dit-512, dit-256), got {case.name}")
    settings = {**case.describe(), "steps": steps}
    return Part("pipeline", case.name, settings, lambda run, peak: _measure(case, steps, run))


def _measure(case: Case, steps: int, settings: Settings) -> dict[str, Any]:
    def prepare(model: nn.Module, variant: Variant, compiled: Compiled | None) -> tuple[Call, dict[str, Any]]:
        call = _generation(model, case, steps, settings.device, compiled)
        call()
        return call, {}

    rows = Stage(make_source(case, settings), settings, prepare).run(variants_of(CONTESTANTS), BOTH)
    for row in rows:
        if "median_ms" in row:
            row["latents_per_second"] = 1e3 * case.batch / row["median_ms"]
    return {"title": f"{case.title}, {steps} steps", "note": _NOTE, "rows": rows}


def _generation(model: nn.Module, case: Case, steps: int, device: str, compiled: Compiled | None) -> Call:
    if not isinstance(model, ModelMixin):
        raise TypeError(f"expected a diffusers model, got {type(model).__name__}")
    pipe = throwaway_pipeline(model, device)
    labels = [i % 1000 for i in range(case.batch)]

    def generate() -> None:
        with nullcontext() if compiled is None else compiled.active():
            pipe(
                class_labels=labels,
                guidance_scale=4.0 if case.cfg else 1.0,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
            )

    return generate
