# SPDX-License-Identifier: Apache-2.0
"""What the project promises about speed and size, held against a results file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers_dq.benchmark.gemm import INT_MM
from diffusers_dq.benchmark.results import Group, Results, Row

OURS = "HTG W8A8 static"
Found = tuple[float, str]  # the value, and where it was found

_MANY_ROWS = 4096
_XL_WIDTH = 1152


class NotMeasured(Exception):
    """Why a bar says nothing about a results file."""


@dataclass(frozen=True)
class Bar:
    """measure(results) raises NotMeasured.   The value has to be at least `bound`, or at most where `at_most`."""

    name: str
    device: str
    bound: float
    measure: Callable[[Results], Found]
    at_most: bool = False

    def judge(self, results: Results) -> dict[str, Any]:
        """{"bar", "bound", "value", "met", "note"}; value and met are None where it was not measured."""
        judged = {"bar": self.name, "bound": f"{'<=' if self.at_most else '>='} {self.bound:g}"}
        try:
            if results.about["device"] != self.device:
                raise NotMeasured(f"it is for a {'GPU' if self.device == 'cuda' else 'CPU'}")
            value, where = self.measure(results)
        except NotMeasured as reason:
            return {**judged, "value": None, "met": None, "note": str(reason)}
        met = value <= self.bound if self.at_most else value >= self.bound
        short = "" if met else f"; misses by {abs(value / self.bound - 1):.1%}"
        return {**judged, "value": value, "met": met, "note": where + short}


def judge_all(results: Results) -> list[dict[str, Any]]:
    return [bar.judge(results) for bar in BARS]


def line(judged: Mapping[str, Any]) -> str:
    """For a terminal."""
    verdict = {True: "met     ", False: "MISSED  ", None: "not measured"}[judged["met"]]
    value = "" if judged["value"] is None else f"{judged['value']:.2f} ({judged['bound']})"
    return f"  {verdict:<13}{judged['bar']}: {value}{'; ' if value else ''}{judged['note']}"


def _worst_gemm(name: str, base: str) -> Callable[[Results], Found]:
    """The smallest ratio of base's time to that of `name`, over the shapes of at least 4096 rows."""

    def measure(results: Results) -> Found:
        ratios = []
        for group in results.of("gemm"):
            times = {row["name"]: row["median_ms"] for row in group["rows"] if "median_ms" in row}
            if group["settings"]["m"] >= _MANY_ROWS and name in times and base in times:
                ratios.append((times[base] / times[name], group["name"]))
        if not ratios:
            raise NotMeasured(f"no GEMM of at least {_MANY_ROWS} rows has times of both {name} and {base}")
        ratios.sort()
        return ratios[0][0], f"worst of {len(ratios)} shapes, {ratios[0][1]}; best {ratios[-1][0]:.2f}"

    return measure


def _headline(results: Results) -> Group:
    return _step(results, "dit-512", layers=28, tokens=1024, batch=16, cfg=True)


def _cpu_case(results: Results) -> Group:
    return _step(results, "dit-256", layers=4, tokens=256, batch=2, cfg=False)


def _step(results: Results, name: str, **settings: Any) -> Group:
    for group in results.of("step"):
        have = group["settings"]
        of_size = have["heads"] * have["head_dim"] == _XL_WIDTH
        if group["name"] == name and of_size and all(have[key] == value for key, value in settings.items()):
            return group
    wanted = ", ".join(f"{key} {value}" for key, value in settings.items())
    raise NotMeasured(f"no step of {name} at width {_XL_WIDTH} with {wanted}")


def _row(group: Group, name: str, mode: str) -> Row:
    for row in group["rows"]:
        if (row["name"], row["mode"]) == (name, mode):
            if "median_ms" in row:
                return row
            raise NotMeasured(f"{name}, {mode} failed: {row.get('failed', 'no reason noted')}")
    raise NotMeasured(f"{name}, {mode} did not take part")


def _speedup(case: Callable[[Results], Group], ours: tuple[str, str], base: tuple[str, str]) -> Callable[..., Found]:
    def measure(results: Results) -> Found:
        group = case(results)
        ms, base_ms = _row(group, *ours)["median_ms"], _row(group, *base)["median_ms"]
        return base_ms / ms, f"{ms:.4g} ms against {base_ms:.4g} ms"

    return measure


def _against_best_peer(results: Results) -> Found:
    group = _headline(results)
    peers = [row for row in group["rows"] if row["kind"] == "peer" and "median_ms" in row]
    if not peers:
        raise NotMeasured("no peer could be measured")
    best = min(peers, key=lambda row: row["median_ms"])
    ms = _row(group, OURS, "compiled")["median_ms"]
    return best["median_ms"] / ms, f"best of {len(peers)} is {best['name']}, {best['mode']}"


def _w4_bytes(results: Results) -> Found:
    group = _headline(results)
    ours, base = (_row(group, name, "compiled")["weight_bytes"] for name in ("HTG W4A8 static", "bf16"))
    return ours / base, f"{ours / 1e6:,.0f} MB of {base / 1e6:,.0f} MB"


_OURS, _BF16 = (OURS, "compiled"), ("bf16", "compiled")
BARS: Sequence[Bar] = (
    Bar("int8 GEMM, M >= 4096, times compiled bf16", "cuda", 1.6, _worst_gemm("W8A8 static", "bf16 compiled")),
    Bar("int8 GEMM, M >= 4096, of cuBLASLt int8", "cuda", 0.75, _worst_gemm("W8A8 static", INT_MM)),
    Bar("DiT-XL/2 512 step, HTG W8A8 times compiled bf16", "cuda", 1.5, _speedup(_headline, _OURS, _BF16)),
    Bar("DiT-XL/2 512 step, HTG W8A8 times the fastest peer", "cuda", 1.0, _against_best_peer),
    Bar(
        "DiT-XL/2 512 step, speed of W4A8 to W8A8",
        "cuda",
        0.9,
        _speedup(_headline, ("HTG W4A8 static", "compiled"), _OURS),
    ),
    Bar("DiT-XL/2 512, bytes of W4A8 weights to bf16", "cuda", 0.30, _w4_bytes, at_most=True),
    Bar("DiT width 1152, 4 blocks, W8A8 times compiled bf16", "cpu", 1.5, _speedup(_cpu_case, _OURS, _BF16)),
    Bar("the same, times eager fp32", "cpu", 5.0, _speedup(_cpu_case, _OURS, ("fp32", "eager"))),
    Bar(
        "the same, times torchao int8 dynamic compiled",
        "cpu",
        1.4,
        _speedup(_cpu_case, _OURS, ("torchao int8 dynamic", "compiled")),
    ),
    Bar("the same, eager times eager bf16", "cpu", 1.0, _speedup(_cpu_case, (OURS, "eager"), ("bf16", "eager"))),
)
