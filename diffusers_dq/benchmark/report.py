# SPDX-License-Identifier: Apache-2.0
"""The benchmark section of kernels/README.md, from the results files beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers_dq.benchmark.bars import judge_all
from diffusers_dq.benchmark.results import Results
from diffusers_dq.benchmark.tables import group_table, plain, profile_tables, table, title

BEGIN = "<!-- benchmarks: begin (generated) -->"
END = "<!-- benchmarks: end -->"
PLOT = "speed.svg"
_HEADINGS = {
    "step": "One denoising step",
    "pipeline": "Whole pipeline",
    "gemm": "Matrix products alone",
    "peak": "Largest product",
}


def load_all(folder: Path) -> tuple[dict[str, Results], dict[str, str]]:
    """(file name -> results, file name -> why it is not shown), in the order of the names."""
    found: dict[str, Results] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.name] = Results.load(path)
        except ValueError as error:
            left_out[path.name] = str(error).split(str(path))[-1].split(";")[0].strip()
    return found, left_out


def section(found: Mapping[str, Results], left_out: Mapping[str, str], folder: str = "benchmarks/results") -> str:
    """Markdown, the markers included.   folder: of the results, as seen from the README."""
    parts = [BEGIN, "## Measured", "Written by `diffusers-dq benchmark report` from the files it names."]
    if not found:
        parts.append(
            "Nothing yet: `diffusers-dq benchmark all` measures, `diffusers-dq benchmark report` writes it here."
        )
    elif any(list(results.of("step")) for results in found.values()):
        parts.append(f"![Speed of a denoising step against compiled bf16]({folder}/{PLOT})")
    for name, results in found.items():
        parts += _of_file(name, results, folder)
    parts += [f"Not shown: [`{name}`]({folder}/{name}), it {plain(reason)}." for name, reason in left_out.items()]
    return "\n\n".join([*parts, END])


def write_readme(readme: Path, text: str) -> None:
    """Puts `text`, markers included, in the place of what is between the markers. Raises ValueError without them."""
    whole = readme.read_text()
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
        raise ValueError(f"{readme} must hold the lines {BEGIN!r} and {END!r} once each, in this order; put them back")
    before, rest = whole.split(BEGIN)
    readme.write_text(before + text + rest.split(END)[1])


def section_of(readme: Path) -> str:
    """What the README holds now, the markers included."""
    whole = readme.read_text()
    return whole[whole.index(BEGIN) : whole.index(END) + len(END)]


def _of_file(name: str, results: Results, folder: str) -> list[str]:
    parts = [f"### {results.about['hardware']}", f"{_about(results)} [All figures]({folder}/{name})."]
    measured = [judged for judged in judge_all(results) if judged["value"] is not None]
    if measured:
        parts.append(_bars(measured))
    for kind, heading in _HEADINGS.items():
        groups = list(results.of(kind))
        if groups:
            parts.append(f"#### {heading}")
        for group in groups:
            parts += [f"**{title(group)}**", group_table(group), *profile_tables(group)]
    return parts


def _about(results: Results) -> str:
    about, settings = results.about, results.about["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    graphs = " CUDA graphs for every contestant." if settings["cuda_graphs"] else ""
    threads = f"{about['threads']} CPU threads, " if about["device"] == "cpu" else f"driver {about['driver']}, "
    commit = f"commit {(about['commit'] or 'unknown')[:12]}{' with changes' if about['dirty'] else ''}"
    compiled = "the whole model" if settings["scope"] == "model" else "the repeated blocks"
    return (
        f"{about['date'][:10]}, {commit}, {threads}{versions}."
        f" Medians of up to {settings['rounds']} interleaved rounds; torch.compile (fullgraph) of {compiled}.{graphs}"
    )


def _bars(bars: Sequence[Mapping[str, object]]) -> str:
    lines = [
        [plain(str(bar["bar"])), plain(str(bar["bound"])), f"{bar['value']:.2f}", "yes" if bar["met"] else "**no**"]
        for bar in bars
    ]
    notes = [f"- {plain(str(bar['bar']))}: {plain(str(bar['note']))}." for bar in bars]
    return "\n\n".join([table(["bar", "bound", "measured", "met"], lines), "\n".join(notes)])
