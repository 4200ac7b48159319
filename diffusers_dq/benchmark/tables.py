# SPDX-License-Identifier: Apache-2.0
"""Groups of a results file as Markdown tables, which a terminal shows as well."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusers_dq.benchmark.results import Group, Row

Column = tuple[str, Callable[[Row], str]]

_LEAST_SHARE = 0.01
_NAME_WIDTH, _NAME_END = 60, 8


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right, padded for a terminal."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        aligned = [cells[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([row(header), f"| {' | '.join(rule)} |", *(row(line) for line in lines)])


def group_table(group: Group) -> str:
    """The rows that have times, then a line for each that failed."""
    if "failed" in group:
        return f"failed: {group['failed']}"
    columns = _COLUMNS[group["kind"]]
    timed = [row for row in group["rows"] if "failed" not in row]
    shown = [column for column in columns if any(column[1](row) for row in timed)]
    lines = [[label(row), *(cell(row) for _, cell in shown)] for row in timed]
    parts = [table([_FIRST[group["kind"]], *(header for header, _ in shown)], lines)] if timed else []
    failed = [row for row in group["rows"] if "failed" in row]
    parts += ["\n".join(f"- {label(row)} failed: {plain(row['failed'])}" for row in failed)] if failed else []
    return "\n\n".join([*parts, *_remarks(group)])


def profile_tables(group: Group) -> list[str]:
    """Where the time of each profiled row goes, after a line that says how to read it; [] where none was profiled."""
    profiled = [row for row in group["rows"] if "profile" in row]
    if not profiled:
        return []
    heading = (
        "Where the time goes, by torch.profiler, in a run after the timed one. ms and calls are a step's, without what"
        f" an entry calls in turn; entries of at least {_LEAST_SHARE:.0%}, of 10 recorded."
    )
    return [heading, *map(_profile_table, profiled)]


def kernel_name(name: str) -> str:
    """Short enough for a table: without Inductor's graph number and hash, and cut in the middle."""
    name = re.sub(r"^graph_\d+_", "", name)
    name = re.sub(r"^## (.*?)(?: \w{30,})? ##$", r"\1", name)
    if len(name) <= _NAME_WIDTH:
        return name
    return f"{name[: _NAME_WIDTH - _NAME_END - 3]}...{name[-_NAME_END:]}"


def _profile_table(row: Row) -> str:
    profile = row["profile"]
    if "failed" in profile:
        return f"- {label(row)} was not profiled: {plain(profile['failed'])}"
    shares = [(entry, entry["ms"] / profile["ms"]) for entry in profile["entries"] if profile["ms"]]
    lines = [
        [_code(kernel_name(entry["name"])), f"{entry['calls']:g}", _milliseconds(entry["ms"]), f"{share:.0%}"]
        for entry, share in shares
        if share >= _LEAST_SHARE
    ]
    total = ["all", "", _milliseconds(profile["ms"]), "100%"]
    return table([label(row), "calls", "ms", "of all"], [*lines, total])


def _code(text: str) -> str:
    """As code, in the cell of a table."""
    return f"`{text.replace('|', chr(92) + '|')}`"


def label(row: Row) -> str:
    return f"{row['name']}, {row['mode']}" if "mode" in row else str(row["name"])


def plain(text: str) -> str:
    """Without what Markdown would take for markup."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def title(group: Group) -> str:
    """With the settings that belong to the number."""
    settings: Mapping[str, Any] = group["settings"]
    if group["kind"] in ("gemm", "peak"):
        return f"M = {settings['m']}, N = {settings['n']}, K = {settings['k']} ({settings['model']})"
    parts = [f"{settings['layers']} layers", f"width {settings['heads'] * settings['head_dim']}"]
    parts += [f"{settings['frames']} frames"] if settings["frames"] > 1 else []
    parts += [
        f"{settings['tokens']} tokens",
        f"batch {settings['batch']}{' with guidance' if settings['cfg'] else ''}",
    ]
    return f"{group.get('title', group['name'])}: {', '.join(parts)}"


def _remarks(group: Group) -> list[str]:
    found = []
    if "roofline_ms" in group:
        found.append(f"The linears alone at the measured int8 peak: {_milliseconds(group['roofline_ms'])} ms.")
    if "definition" in group:
        found.append(f"int8 peak {group['int8_tops']:.3g} TOP/s: {group['definition']}.")
    return found


def _number(key: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: format(row[key] * scale, form) if row.get(key) is not None else ""


def _milliseconds(value: float) -> str:
    """Three or four digits, whatever the size."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.1f}"


def _spread(row: Row) -> str:
    return f"{_milliseconds(row['quartile_low_ms'])} - {_milliseconds(row['quartile_high_ms'])}"


_TIME: tuple[Column, ...] = (("ms", lambda row: _milliseconds(row["median_ms"])), ("quartiles", _spread))
_GEMM: tuple[Column, ...] = (
    *_TIME,
    ("TOP/s", _number("tops", ".3g")),
    ("of int8 peak", _number("of_int8_peak", ".2f")),
    ("x bf16 compiled", _number("times_bf16_compiled", ".2f")),
    ("x _int_mm", _number("times_int_mm", ".2f")),
)
_STEP: tuple[Column, ...] = (
    *_TIME,
    ("x bf16 compiled", _number("times_bf16_compiled", ".2f")),
    ("x bf16 eager", _number("times_bf16_eager", ".2f")),
    ("weights MB", _number("weight_bytes", ",.1f", 1e-6)),
    ("peak MB", _number("peak_bytes", ",.0f", 1e-6)),
)
_PIPELINE: tuple[Column, ...] = (
    *_TIME,
    ("latents/s", _number("latents_per_second", ".3g")),
    ("x bf16 compiled", _number("times_bf16_compiled", ".2f")),
    ("x bf16 eager", _number("times_bf16_eager", ".2f")),
)
_COLUMNS = {"gemm": _GEMM, "peak": _GEMM, "step": _STEP, "pipeline": _PIPELINE}
_FIRST = {"gemm": "product", "peak": "product", "step": "one step", "pipeline": "one batch"}
