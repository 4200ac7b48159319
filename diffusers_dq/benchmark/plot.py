# SPDX-License-Identifier: Apache-2.0
"""A picture of the step benchmarks: how many times compiled bf16 each compiled contestant is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_dq.benchmark.results import Group, Results
from diffusers_dq.benchmark.tables import title
from diffusers_dq.evaluation.metrics import optional

_COLORS = {"baseline": "#8c8c8c", "ours": "#1f77b4", "peer": "#d98c2b"}
_BAR_INCHES = 0.27


def save_plot(found: Mapping[str, Results], path: Path) -> bool:
    """Writes the picture, on white, so that it reads on dark and light pages. False where no step was measured.

    Raises ImportError without matplotlib.
    """
    panels = [
        (results.about["hardware"], group, bars)
        for results in found.values()
        for group in results.of("step")
        if (bars := _bars(group))
    ]
    if not panels:
        return False
    matplotlib, figures = optional("matplotlib"), optional("matplotlib.figure")
    heights = [len(bars) * _BAR_INCHES + 0.7 for *_, bars in panels]
    figure = figures.Figure(figsize=(8, sum(heights) + 0.4), dpi=150, layout="constrained", facecolor="white")
    all_axes = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (hardware, group, bars) in zip(all_axes, panels, strict=True):
        model, _, sizes = title(group).rpartition(": ")
        _panel(axes, f"{model}\n{sizes} ({hardware})", bars)
    all_axes[-1].set_xlabel("speed of one denoising step, times compiled bf16", fontsize=8)
    figure.legend(handles=_legend(), loc="outside lower right", ncols=len(_COLORS), fontsize=7, frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "diffusers-dq"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True


Bars = list[tuple[str, str, float]]


def _bars(group: Group) -> Bars:
    """(contestant, kind, times compiled bf16) of the compiled ones, and of those that were measured eager alone."""
    timed = [row for row in group["rows"] if "times_bf16_compiled" in row]
    modes: dict[str, str] = {}
    for row in timed:
        if row["mode"] == "compiled" or row["name"] not in modes:
            modes[row["name"]] = row["mode"]
    return [
        (row["name"] + ("" if row["mode"] == "compiled" else ", eager"), row["kind"], row["times_bf16_compiled"])
        for row in timed
        if modes[row["name"]] == row["mode"]
    ]


def _panel(axes: Any, heading: str, bars: Bars) -> None:
    names, kinds, values = zip(*bars, strict=True)
    drawn = axes.barh(range(len(bars)), values, color=[_COLORS[kind] for kind in kinds], height=0.72)
    axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=7)
    axes.set_yticks(range(len(bars)), names, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="0.35", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, max(*values, 1) * 1.12)
    axes.set_title(heading, fontsize=8, loc="left")
    axes.tick_params(length=0, labelsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _legend() -> list[Any]:
    patches = optional("matplotlib.patches")
    names = {"baseline": "full precision", "ours": "diffusers_dq", "peer": "peers"}
    return [patches.Patch(color=color, label=names[kind]) for kind, color in _COLORS.items()]
