# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step goes: the entries of torch.profiler with the largest self time."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from diffusers_dq.benchmark.timing import Call

Profile = dict[str, Any]

_WARM_UPS, _STEPS = 2, 10
_ENTRIES = 10
_LONGEST_NAME = 200  # templates of CUDA kernels have names of thousands of characters


def profile_of(call: Call, device: str) -> Profile:
    """Of one step, `call()`, the average of 10. device: cpu, or cuda for the time of its kernels; see `summary`."""
    for _ in range(_WARM_UPS):
        call()
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        for _ in range(_STEPS):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    return summary(profiler.key_averages(), _STEPS, on_gpu=on_gpu)


def summary(events: Iterable[Any], steps: int, *, on_gpu: bool) -> Profile:
    """{"ms": a step, of all events, "entries": [{"name", "calls": a step, "ms": a step}]}, at most 10, longest first.

    Self times: without what an event calls. events: averages by name over `steps` steps, times in microseconds.
    on_gpu: what runs on the device counts, once, and not the host's part that started it.
    """
    if on_gpu:
        times = [(event, event.self_device_time_total) for event in events if _is_device_work(event)]
    else:
        times = [(event, event.self_cpu_time_total) for event in events]
    longest = sorted(times, key=lambda timed: -timed[1])[:_ENTRIES]
    return {
        "ms": sum(time for _, time in times) / steps / 1e3,
        "entries": [
            {"name": event.key[:_LONGEST_NAME], "calls": event.count / steps, "ms": time / steps / 1e3}
            for event, time in longest
            if time > 0
        ],
    }


def _is_device_work(event: Any) -> bool:
    """A kernel or copy; an annotation spans the kernels within it, which have entries of their own."""
    return event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
