# SPDX-License-Identifier: Apache-2.0
"""One denoising step of a transformer: the forward pass, for each contestant eager and compiled."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_dq.benchmark.compiling import Compiled
from diffusers_dq.benchmark.graphs import captured
from diffusers_dq.benchmark.models import Case, Inputs, inputs
from diffusers_dq.benchmark.profiling import Profile, profile_of
from diffusers_dq.benchmark.roofline import LinearCall, weight_bytes
from diffusers_dq.benchmark.session import Part
from diffusers_dq.benchmark.settings import Mode, Settings
from diffusers_dq.benchmark.stage import BOTH, Stage, make_source
from diffusers_dq.benchmark.timing import Call
from diffusers_dq.benchmark.variants import NOTE, Variant, variants_of

_WARM_UPS = 2


def step_part(case: Case, names: tuple[str, ...] | None = None, modes: tuple[Mode, ...] = BOTH) -> Part:
    """names: of contestants, None is all.   modes: of all but bf16, which runs in both."""
    variants = variants_of(names)
    settings = {**case.describe(), "contestants": list(names) if names else None, "modes": list(modes)}

    def measure(settings: Settings, peak: float | None) -> dict[str, Any]:
        return measure_step(case, settings, peak, variants, modes)

    return Part("step", case.name, settings, measure)


def measure_step(
    case: Case, settings: Settings, peak: float | None, variants: Sequence[Variant], modes: Sequence[Mode]
) -> dict[str, Any]:
    source = make_source(case, settings)
    arguments = {dtype: inputs(case, settings.device, dtype) for dtype in (torch.bfloat16, torch.float32)}

    def prepare(model: nn.Module, variant: Variant, compiled: Compiled | None) -> tuple[Call, dict[str, Any]]:
        step = Step(model, arguments[variant.dtype], compiled)
        facts = {
            "weight_bytes": weight_bytes(model),
            "relative_error_to_bf16": _relative_error(step(), source.reference),
        }
        for _ in range(_WARM_UPS):
            step()
        if settings.device == "cuda":
            facts["peak_bytes"] = facts["weight_bytes"] + _peak_beyond(step)
        return captured(step) if settings.cuda_graphs else step, facts

    def profile(model: nn.Module, variant: Variant, compiled: Compiled | None) -> Profile:
        return profile_of(Step(model, arguments[variant.dtype], compiled), settings.device)

    rows = Stage(source, settings, prepare, profile if settings.profile else None).run(variants, modes)
    group: dict[str, Any] = {"title": case.title, "note": NOTE, "rows": rows, **_roofline(source.linears, peak)}
    if settings.device == "cpu":
        group["process_peak_rss_bytes"] = _peak_rss()
    return group


@dataclass(frozen=True)
class Step:
    """The timed call: one forward, compiled or not."""

    model: nn.Module
    arguments: Inputs
    compiled: Compiled | None = None

    def __call__(self) -> Tensor:
        with self._active():
            return self.model(**self.arguments).sample

    def _active(self) -> AbstractContextManager[None]:
        return nullcontext() if self.compiled is None else self.compiled.active()


def _roofline(linears: Sequence[LinearCall], peak: float | None) -> dict[str, Any]:
    """gemm_operations: of all linears.   roofline_ms: what they would take at the int8 peak that this run measured."""
    operations = sum(call.operations for call in linears)
    found: dict[str, Any] = {"gemm_operations": operations}
    if peak:
        found["roofline_ms"] = operations / peak / 1e9
    return found


def _relative_error(output: Tensor, reference: Tensor) -> float:
    difference = (output.float() - reference.float()).norm() / reference.float().norm()
    if not difference.isfinite():
        raise ValueError("its output is not finite; a wrong result is not timed")
    return float(difference)


def _peak_beyond(call: Callable[[], Any]) -> int:
    """Bytes of CUDA memory that a call takes at its peak beside what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_rss() -> int | None:
    """Of the whole process so far, all contestants in memory; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
