# SPDX-License-Identifier: Apache-2.0
"""Runs parts one after the other, prints each and keeps its results."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_dq.benchmark.failures import reason_of
from diffusers_dq.benchmark.results import Results
from diffusers_dq.benchmark.settings import Settings
from diffusers_dq.benchmark.tables import group_table, profile_tables


@dataclass(frozen=True)
class Part:
    """measure(settings, int8 peak in TOP/s or None) -> the group's rows and whatever else it has to say."""

    kind: str
    name: str
    settings: Mapping[str, Any]
    measure: Callable[[Settings, float | None], dict[str, Any]]


@dataclass(frozen=True)
class Session:
    """budget: seconds after which no further part begins; what is left is named, and `--resume` measures it."""

    settings: Settings
    results: Results
    say: Callable[[str], None] = print
    budget: float = float("inf")

    def run(self, parts: Sequence[Part]) -> None:
        start = time.perf_counter()
        left: list[str] = []
        for part in parts:
            title = f"{part.kind} {part.name}"
            if self.results.holds(part.kind, part.name, part.settings):
                self.say(f"{title}: measured already")
            elif time.perf_counter() - start > self.budget:
                left.append(title)
            else:
                self._run(part, title)
        if left:
            self.say(f"\nover the budget of {self.budget:g} s; left for --resume: {', '.join(left)}")

    def _run(self, part: Part, title: str) -> None:
        self.say(f"\n{title} ...")
        start = time.perf_counter()
        group: dict[str, Any] = {"kind": part.kind, "name": part.name, "settings": dict(part.settings), "rows": []}
        try:
            with torch.no_grad():
                group |= part.measure(self.settings, self.results.int8_peak())
        except Exception as error:
            group["failed"] = reason_of(error)
        group["seconds"] = round(time.perf_counter() - start, 1)
        self.results.add(group)
        self.say("\n\n".join([group_table(group), *profile_tables(group)]))
        self._clean_up()

    def _clean_up(self) -> None:
        torch._dynamo.reset()
        gc.collect()
        if self.settings.device == "cuda":
            torch.cuda.empty_cache()
