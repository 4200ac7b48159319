# SPDX-License-Identifier: Apache-2.0
"""Contestants made from one model's weights: each prepared, timed in turns, and a row for each, failed or not."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import nn

from diffusers_dq.benchmark.compiling import Compiled, compiled_anew, kept_inductor_config, many_variants
from diffusers_dq.benchmark.failures import reason_of
from diffusers_dq.benchmark.models import Case, build, inputs
from diffusers_dq.benchmark.profiling import Profile
from diffusers_dq.benchmark.results import Row
from diffusers_dq.benchmark.roofline import linear_calls
from diffusers_dq.benchmark.settings import Mode, Settings
from diffusers_dq.benchmark.timing import Call, Spread, interleave
from diffusers_dq.benchmark.variants import Source, Variant, calibrated

Prepare = Callable[[nn.Module, Variant, Compiled | None], tuple[Call, dict[str, Any]]]
TakeProfile = Callable[[nn.Module, Variant, Compiled | None], Profile]
BOTH: tuple[Mode, ...] = ("eager", "compiled")


def make_source(case: Case, settings: Settings) -> Source:
    """The model, its bf16 copy, one forward of that, and for HTG the statistics of a short denoising run."""
    full = build(case, settings.device, settings.seed)
    statistics = calibrated(full, settings.device) if case.family == "dit" else None
    half = copy.deepcopy(full).bfloat16()
    arguments = inputs(case, settings.device, torch.bfloat16)
    linears, reference = linear_calls(half, lambda: half(**arguments).sample)
    return Source(case, full if settings.device == "cpu" else None, half, statistics, linears, reference)


@dataclass(frozen=True)
class Entrant:
    """inductor: Inductor's settings after the model was made, as bytes."""

    model: nn.Module
    variant: Variant
    inductor: bytes


@dataclass
class Stage:
    """prepare(model, variant, compiled) -> what to time, warm by now, and facts for its row.
    profile(model, variant, compiled) -> where its time goes, compiled anew; None leaves it out.
    """

    source: Source
    settings: Settings
    prepare: Prepare
    profile: TakeProfile | None = None
    rows: dict[str, Row] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    entrants: dict[str, Entrant] = field(default_factory=dict)

    def run(self, variants: Sequence[Variant], modes: Sequence[Mode]) -> list[Row]:
        """modes: of all but bf16, against which the rest is compared: it runs in both."""
        with many_variants():
            for variant in variants:
                if not variant.takes_part(self.source.case, self.settings.device):
                    continue
                with kept_inductor_config():
                    self._enter(variant, BOTH if variant.name == "bf16" else modes)
            self._time()
            if self.profile is not None:
                self._profile(self.profile)
        return list(self.rows.values())

    def _enter(self, variant: Variant, modes: Sequence[Mode]) -> None:
        for mode in modes:
            self.rows[f"{variant.name} {mode}"] = {"name": variant.name, "mode": mode, "kind": variant.kind}
        try:
            model = variant.build(self.source)
        except Exception as error:
            for mode in modes:
                self._fail(f"{variant.name} {mode}", reason_of(error))
            return
        for mode in modes:
            label = f"{variant.name} {mode}"
            try:
                self.calls[label], facts = self.prepare(model, variant, self._compiled(model, mode))
            except Exception as error:
                self._fail(label, reason_of(error))
            else:
                self.rows[label] |= facts
                self.entrants[label] = Entrant(model, variant, inductor_config.save_config())

    def _compiled(self, model: nn.Module, mode: str) -> Compiled | None:
        return Compiled(model, self.settings) if mode == "compiled" else None

    def _time(self) -> None:
        settings = self.settings
        times = interleave(
            self.calls,
            settings.timer(),
            rounds=settings.rounds,
            seed=settings.seed,
            max_seconds=settings.max_seconds,
        )
        for label, reason in times.failures.items():
            self._fail(label, reason)
        spreads = {label: Spread.of(seconds) for label, seconds in times.seconds.items()}
        for label, spread in spreads.items():
            self.rows[label] |= asdict(spread) | _ratios(spread, spreads)

    def _profile(self, take: TakeProfile) -> None:
        """After all were timed: what is compiled for a profile is slower by the profile."""
        for label, entrant in self.entrants.items():
            row = self.rows[label]
            if "failed" in row:
                continue
            try:
                with compiled_anew(entrant.inductor):
                    row["profile"] = take(entrant.model, entrant.variant, self._compiled(entrant.model, row["mode"]))
            except Exception as error:
                row["profile"] = {"failed": reason_of(error)}

    def _fail(self, label: str, reason: str) -> None:
        row = self.rows[label]
        self.rows[label] = {"name": row["name"], "mode": row["mode"], "kind": row["kind"], "failed": reason}


def _ratios(spread: Spread, spreads: Mapping[str, Spread]) -> dict[str, float]:
    return {
        f"times_bf16_{mode}": spreads[f"bf16 {mode}"].median_ms / spread.median_ms
        for mode in BOTH
        if f"bf16 {mode}" in spreads
    }
