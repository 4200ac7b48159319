# SPDX-License-Identifier: Apache-2.0
"""Activation bits that change with the denoising step: guard steps, ranges of steps, and diffusers' words for them.

The first steps decide on a picture's layout and the last on its detail; rounding them less costs little of the speed
of a trajectory. Weights stay as they are. Steps become ranges of timestep values, so another number of steps at
inference keeps the same shares of the schedule.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffusers_dq.timesteps import Boundaries

POLICY = "diffusion_step_policy"
_FIXED = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "scope": ["transformer"],
    "default_mode": "native",
}


@dataclass(frozen=True)
class StepBits:
    """boundaries: thresholds in timestep values, ascending.   bits: of activations in each range, 16 not rounded, None
    as each linear is laid out; one more than boundaries."""

    boundaries: Boundaries
    bits: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if len(self.bits) != len(self.boundaries) + 1 or list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError(f"{len(self.bits)} ranges of steps do not go with the boundaries {self.boundaries}")

    def at(self, timestep: float) -> int | None:
        return self.bits[bisect_left(self.boundaries, timestep)]

    @classmethod
    def of_schedule(cls, timesteps: Tensor, guard: tuple[int, int], ranges: Sequence[int] | None) -> "StepBits | None":
        """timesteps: [S], in the order of denoising.   guard: how many first and last steps are not rounded.
        ranges: bits of as many equal parts of the schedule, from its first to its last.

        None where every step is alike.   Raises ValueError for more parts or guard steps than there are steps.
        """
        steps = len(timesteps)
        if sum(guard) > steps:
            raise ValueError(f"guard_steps {guard} are more than the {steps} calibrated steps")
        if len(ranges or ()) > steps:
            raise ValueError(f"step_bits has {len(ranges or ())} parts, and only {steps} steps were calibrated")
        bits: list[int | None] = [None] * steps
        if ranges:
            bits = [ranges[i * len(ranges) // steps] for i in range(steps)]
        first, last = guard
        bits = [16 if i < first or i >= steps - last else b for i, b in enumerate(bits)]
        if set(bits) == {None}:
            return None
        ascending = sorted(zip(timesteps.tolist(), bits, strict=True), key=lambda step: step[0])
        pairs = list(zip(ascending, ascending[1:], strict=False))
        changes = [(low, high) for low, high in pairs if low[1] != high[1]]
        boundaries = tuple((low[0] + high[0]) / 2 for low, high in changes)
        return cls(boundaries, (ascending[0][1], *(high[1] for _, high in changes)))

    def to_dict(self) -> dict[str, Any]:
        return {"boundaries": list(self.boundaries), "bits": list(self.bits)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "StepBits":
        return cls(tuple(map(float, content["boundaries"])), tuple(content["bits"]))


def to_runtime(guard: tuple[int, int]) -> dict[str, Any]:
    """`quantization_config.runtime` as diffusers 0.42 reads it (pipelines/cosmos/mixed_precision.py)."""
    windows = {
        name: {"count": count, "mode": "a16"} for name, count in zip(("first_steps", "last_steps"), guard, strict=True)
    }
    return {POLICY: {**_FIXED, **windows, "overlap": "a16", "reasoner": "native"}}


def from_runtime(runtime: Mapping[str, Any]) -> tuple[int, int]:
    """(first, last) steps whose activations are not rounded. Raises ValueError for a policy of another kind."""
    policy = runtime.get(POLICY)
    if set(runtime) != {POLICY} or not isinstance(policy, Mapping):
        raise ValueError(f"runtime must be {{{POLICY!r}: {{...}}}}, got {runtime!r}")
    differing = {key: policy.get(key) for key, value in _FIXED.items() if policy.get(key) != value}
    if differing:
        raise ValueError(f"{POLICY} has {differing}; supported is {_FIXED}")
    return _count(policy, "first_steps"), _count(policy, "last_steps")


def _count(policy: Mapping[str, Any], name: str) -> int:
    window = policy.get(name)
    if not isinstance(window, Mapping) or window.get("mode") not in ("a16", "native"):
        raise ValueError(f"{POLICY}.{name} must be {{'count': n, 'mode': 'a16' or 'native'}}, got {window!r}")
    count = window.get("count")
    if type(count) is not int or count < 0:
        raise ValueError(f"{POLICY}.{name}.count must be a whole number, got {count!r}")
    return count if window["mode"] == "a16" else 0
