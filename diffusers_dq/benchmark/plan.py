# SPDX-License-Identifier: Apache-2.0
"""What `diffusers-dq benchmark all` measures, the most important first, so that a short budget buys the most."""

from diffusers_dq.benchmark.gemm import CPU_LARGE, CPU_SMALL, LARGE, SMALL, Gemm, gemm_part, peak_part
from diffusers_dq.benchmark.models import case_of
from diffusers_dq.benchmark.pipeline import pipeline_part
from diffusers_dq.benchmark.session import Part
from diffusers_dq.benchmark.settings import Mode
from diffusers_dq.benchmark.step import step_part
from diffusers_dq.benchmark.variants import VARIANTS

_COMPILED: tuple[Mode, ...] = ("compiled",)
_EAGER: tuple[Mode, ...] = ("eager",)
_HEADLINE = (
    "HTG W8A8 static",
    "HTG W4A8 static",
    "RTN W8A8 dynamic",
    "torchao int8 dynamic",
    "torchao float8 row",
    "SDNQ int8",
)
PEAK_SIZE = {"cuda": 8192, "cpu": 2048}


def gemm_parts(device: str) -> list[Part]:
    return [gemm_part(gemm) for gemm in ((*LARGE, *SMALL) if device == "cuda" else (*CPU_LARGE, *CPU_SMALL))]


def full_plan(device: str) -> list[Part]:
    return _cuda_plan() if device == "cuda" else _cpu_plan()


def _cuda_plan() -> list[Part]:
    """About 8 minutes on an H200, most of it torch.compile. FLUX.1 with 4 of its 19 + 38 layers, 4 + 8."""
    return [
        peak_part(PEAK_SIZE["cuda"]),
        *(gemm_part(gemm) for gemm in LARGE[:8]),
        step_part(case_of("dit-512"), _HEADLINE, _COMPILED),
        *(gemm_part(gemm) for gemm in LARGE[8:]),
        step_part(case_of("flux").changed(layers=4), None, _COMPILED),
        step_part(case_of("pixart"), None, _COMPILED),
        step_part(case_of("dit-256"), None, _COMPILED),
        step_part(case_of("stdit"), None, _COMPILED),
        *(gemm_part(gemm) for gemm in SMALL),
        pipeline_part(case_of("dit-512"), steps=20),
        step_part(case_of("dit-256"), _HEADLINE, _EAGER),
    ]


def _cpu_plan() -> list[Part]:
    """The step that the bars are about, then GEMMs, then a block or two of the other models."""
    return [
        peak_part(PEAK_SIZE["cpu"]),
        step_part(case_of("dit-256").changed(layers=4, batch=2, cfg=False)),
        *gemm_parts("cpu"),
        step_part(case_of("pixart").changed(layers=2, batch=1, tokens=256, cfg=False)),
        step_part(case_of("stdit").changed(layers=1, frames=4, tokens=64, cfg=False)),
        step_part(case_of("flux").changed(layers=1, tokens=256, text=64)),
        pipeline_part(case_of("dit-256").changed(layers=4, batch=1), steps=5),
    ]


def dry_plan() -> list[Part]:
    """Every path, at sizes where nothing takes time and no number means anything."""
    tiny = dict(layers=1, heads=2, head_dim=64, tokens=16, batch=1)
    few = ("bf16", "RTN W8A8 dynamic")
    text = dict(text=8, text_width=64)
    return [
        peak_part(128),
        gemm_part(Gemm("dry run", 128, 96, 64)),
        gemm_part(Gemm("dry run, few rows", 2, 96, 64)),
        step_part(case_of("dit-512").changed(**tiny), tuple(VARIANTS)),
        step_part(case_of("dit-256").changed(**tiny), few, _EAGER),
        step_part(case_of("pixart").changed(**tiny, **text), few, _COMPILED),
        step_part(case_of("stdit").changed(**tiny, **text, frames=2), few, _COMPILED),
        step_part(case_of("flux").changed(**tiny, **text), few, _COMPILED),
        pipeline_part(case_of("dit-256").changed(**tiny), steps=2),
    ]
