# SPDX-License-Identifier: Apache-2.0
"""The measured figures of README.md and choosing.md, from the committed results.

`written` fills the tables between `<!-- begin: NAME, by docs/generate.py -->` and `<!-- end: NAME -->`. `SENTENCES`
are what the prose says with figures in it, made from the results too: tests/docs/test_figures.py looks for each.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "examples" / "results"
_BEGIN, _END = "<!-- begin: {}, by docs/generate.py -->", "<!-- end: {} -->"
_MARKED = re.compile(r"<!-- begin: (.+?), by docs/generate\.py -->\n.*?<!-- end: \1 -->", re.DOTALL)
_COLUMNS = ("FID", "sFID", "IS", "precision", "recall", "FID to full precision", "PSNR", "SSIM")
_BALANCED, _QUALITY, _SPEED = (f'ours: preset="{name}"' for name in ("balanced", "quality", "speed"))
_SHORT = MappingProxyType(
    {
        "RTN static": "RTN, static",
        "RTN dynamic": "RTN, a token",
        "Q-DiT": "Q-DiT, GPTQ",
        "QuaRot": "QuaRot, GPTQ",
        "ours: htg, its default here": "ours: `htg`",
        "ours: speed": "**speed**",
        "ours: balanced": "**balanced**",
        "ours: quality": "**quality**",
    }
)


def written(text: str) -> str:
    """`text` with every marked table as the results have it now. Raises KeyError for a name that no table has."""
    return _MARKED.sub(lambda found: marked(found[1], TABLES[found[1]]()), text)


def marked(name: str, table: str) -> str:
    return f"{_BEGIN.format(name)}\n{table}\n{_END.format(name)}"


def results(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def rounded(value: Any, digits: int) -> str:
    """Halves away from zero, as who reads the second figure of a table would."""
    return str(Decimal(str(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def _by_psnr(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Full precision, which has none, first."""
    return sorted((row for row in rows if row["figures"]), key=lambda row: float(row["figures"].get("PSNR", "-inf")))


def demo_table() -> str:
    rows = [
        (
            name,
            *(("", "") if row["psnr_db"] is None else (f"{row['psnr_db']:.2f}", f"{row['ssim']:.4f}")),
            f"{row['bytes']:,}",
        )
        for name, row in results("demo.json")["models"].items()
    ]
    return _table(("", "PSNR, dB", "SSIM", "bytes of the file"), rows)


def w4a8_table() -> str:
    rows = [
        (_ours(row["label"]), _mb(row), *(row["figures"].get(name, "") for name in _COLUMNS))
        for row in _by_psnr(results("tables-w4a8-outliers.json")["rows"])
    ]
    return _table(("W4A8", "MB", *(name.replace("FID to full precision", "FID to full") for name in _COLUMNS)), rows)


def _ours(label: str) -> str:
    ours, _, what = label.partition(": ")
    name, comma, rest = what.partition(",")
    return f"**ours**: `{name}`{comma}{rest}" if ours == "ours" else label


def _mb(row: Mapping[str, Any]) -> str:
    return f"{row['nbytes'] / 1e6:.2f}"


def steps_50_table() -> str:
    rows = [
        (row["label"], row["figures"]["FID"], row["figures"].get("PSNR", ""))
        for row in _by_psnr(results("tables-w4a8-outliers-50-steps.json")["tables"]["main"])
    ]
    return _table(("W4A8, 50 steps", "FID", "PSNR, dB"), rows)


def w8a8_table() -> str:
    tables = results("tables-w8a8-w6a8-outliers.json")["tables"]
    psnr = {
        bits: {row["label"]: row["figures"]["PSNR"] for row in _by_psnr(rows)[1:]} for bits, rows in tables.items()
    }
    labels = list(psnr["W8A8"])
    rows = [(bits, *(rounded(found[label], 1) for label in labels)) for bits, found in psnr.items()]
    return _table(("", *(_SHORT.get(label, label) for label in labels)), rows)


def presets_table() -> str:
    """Cells are "PSNR at 25 steps, at 50 steps"."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in results("quality-16-pictures.json")["rows"]:
        if row["outliers"]:
            cell = found.setdefault(row["bits"], {}).setdefault(row["label"], [])
            cell.append(f"{row['psnr_db']:.1f}")
    labels = ("quality", "balanced", "speed", "QuaRot, GPTQ", "ViDiT-Q", "RTN, a token")
    rows = [(bits, *(", ".join(found[bits].get(label, ())) for label in labels)) for bits in ("W8A8", "W6A8", "W4A8")]
    return _table(("", *labels), rows)


def speed_table() -> str:
    names = {
        name: name.replace(" static", "")
        for name in (
            "bf16",
            "fp32",
            "HTG W8A8 static",
            "RTN W8A8 dynamic",
            "HTG W4A8 static",
            "torchao int8 dynamic",
            "SDNQ int8",
        )
    }
    measured = _step()
    rows = []
    for mode in ("eager", "compiled"):
        least = min(measured[name, mode] for name in names)
        cells = (f"{measured[name, mode]:.1f}" for name in names)
        rows.append((mode, *(f"**{cell}**" if cell == f"{least:.1f}" else cell for cell in cells)))
    return _table(("", *names.values()), rows)


def _step() -> dict[tuple[str, str], float]:
    """(name, mode) -> median ms of the step on four blocks of DiT-XL/2."""
    return {(row["name"], row["mode"]): row["median_ms"] for row in _step_rows() if row.get("median_ms") is not None}


def _step_rows() -> list[dict[str, Any]]:
    content = json.loads((ROOT / "kernels" / "benchmarks" / "results" / "step-amd-epyc.json").read_text())
    (step,) = [group for group in content["groups"] if group["kind"] == "step"]
    rows: list[dict[str, Any]] = step["rows"]
    return rows


TABLES: Mapping[str, Callable[[], str]] = MappingProxyType(
    {
        "demo": demo_table,
        "W4A8": w4a8_table,
        "W4A8 at 50 steps": steps_50_table,
        "W8A8 and W6A8": w8a8_table,
        "presets": presets_table,
        "speed": speed_table,
    }
)


def _rows(file: str, table: str = "") -> dict[str, dict[str, Any]]:
    """label -> its figures as numbers, and "MB"."""
    content = results(file)
    rows = content["tables"][table] if table else content["rows"]
    return {
        row["label"]: {name: float(value) for name, value in row["figures"].items()} | {"bytes": row["nbytes"]}
        for row in rows
        if row["figures"]
    }


def readme_sentences() -> list[str]:
    """With one space wherever the page has a space or a new line."""
    return [
        *_w4a8_sentences(),
        *_fid_sentences(),
        *_w8a8_sentences(),
        *_preset_sentences(),
        *_ablation_cells(),
        *_speed_sentences(),
    ]


def _w4a8_sentences() -> list[str]:
    rows = _rows("tables-w4a8-outliers.json")
    balanced, quality = rows[_BALANCED], rows[_QUALITY]
    least = min(row["bytes"] for row in rows.values())
    above = balanced["bytes"] / least - 1
    papers = [
        row["PSNR"]
        for label, row in rows.items()
        if "PSNR" in row and not label.startswith("ours") and row["bytes"] < 1.05 * balanced["bytes"]
    ]
    mixed = _rows("tables-ablations.json", "viditq")["+ scaling, rotation, mixed precision"]
    return [
        f'At the size of a plain W4A8 file ({100 * above:.1f} percent above the smallest) `preset="balanced"` is'
        f" {balanced['PSNR'] - max(papers):.1f} dB ahead of the best paper of that size",
        f"a file of {rows['SVDQuant, rank 32']['bytes'] / balanced['bytes']:.1f} times the size; `quality` spends"
        f" {100 * (quality['bytes'] / least - 1):.0f} percent more bytes than the smallest",
        f"with bits allocated it has {rounded(mixed['PSNR'], 1)} dB in {mixed['bytes'] / 1e6:.2f} MB",
    ]


def _fid_sentences() -> list[str]:
    rows = _rows("tables-w4a8-outliers.json")
    bootstrap = results("fid-bootstrap-50-steps.json")
    test, training = (bootstrap["references"][name]["w4a8-viditq"] for name in ("test", "training"))
    return [
        f"ViDiT-Q is below full precision's own at 10 steps ({rows['ViDiT-Q, uniform bits']['FID']:.2f} and"
        f" {rows['full precision']['FID']:.2f}) and at 50 (by {-test['mean']:.2f}, standard deviation"
        f" {test['sd']:.2f} over {bootstrap['draws']} bootstraps of the pictures; by {-training['mean']:.2f} against"
        " training pictures too",
    ]


def _w8a8_sentences() -> list[str]:
    eight, six = (_rows("tables-w8a8-w6a8-outliers.json", bits) for bits in ("W8A8", "W6A8"))
    large, ours = eight["SVDQuant, rank 32"]["bytes"], eight["ours: balanced"]
    leads = []
    for rows in (eight, six):
        others = [row["PSNR"] for name, row in rows.items() if "PSNR" in row and not name.startswith(("ours", "SVD"))]
        leads.append(rows["ours: balanced"]["PSNR"] - max(others))
    return [
        f"makes its file {large / 1e6:.2f} MB at W8A8 where `balanced` takes {ours['bytes'] / 1e6:.2f}; among files"
        f" of one size `balanced` leads by {leads[0]:.1f} and {leads[1]:.1f} dB"
    ]


def _preset_sentences() -> list[str]:
    found = {
        (row["label"], row["bits"], row["steps"], row["outliers"]): f"{row['psnr_db']:.1f}"
        for row in results("quality-16-pictures.json")["rows"]
    }
    return [
        f"Without outliers `quality` has {found['quality', 'W4A8', 25, False]} dB at W4A8 and 25 steps",
        f"At W8A8 with 50 steps the paper's form reaches {found['HTG, paper', 'W8A8', 50, False]} dB, the default"
        f" {found['HTG', 'W8A8', 50, False]}",
    ]


def _ablation_cells() -> list[str]:
    def at(table: str) -> Callable[[str], str]:
        rows = _rows("tables-ablations.json", table)
        return lambda label: rounded(rows[label]["PSNR"], 1)

    def cost(table: str, without: str, label: str) -> str:
        rows = _rows("tables-ablations.json", table)
        return f"{rows[without]['PSNR'] - rows[label]['PSNR']:.1f}"

    htg, ptq, qdit, viditq = map(at, ("htg", "ptq4dit", "qdit", "viditq"))
    return [
        f"none {htg('none')}, + shift {htg('+ shift')}, + scale {htg('+ scale')}, both {htg('+ shift, scale')};"
        f" G = 1, 5, 10: {htg('G = 1')}, {htg('G = 5')}, {htg('G = 10')};"
        f" alpha .9, .99, .999: {htg('alpha = 0.9')}, {htg('+ shift, scale')}, {htg('alpha = 0.999')}",
        f"range search {ptq('baseline')}, + CSB {ptq('+ CSB')}, + SSC {ptq('+ CSB, SSC')}; of samples, as the code"
        f" {ptq('+ CSB, SSC of samples')}; range search + AdaRound {ptq('baseline + AdaRound')}, all"
        f" {ptq('+ CSB, SSC, AdaRound')}",
        f"The shift on top of the scale costs {cost('htg', '+ scale', '+ shift, scale')} dB",
        f"SSC costs {cost('ptq4dit', '+ CSB', '+ CSB, SSC')} dB",
        f"static {qdit('RTN, static')}, + groups of 32 {qdit('+ groups')}, + dynamic {qdit('+ groups, dynamic')};"
        f" groups of 64 {qdit('groups of 64, dynamic')}, sizes searched at their BitOps"
        f" {qdit('sizes searched, at the BitOps of 64')}",
        f"static {viditq('static, a tensor')}, a token {viditq('dynamic, a token')}, + scaling {viditq('+ scaling')},"
        f" rotation alone {viditq('+ rotation')}, both {viditq('+ scaling, rotation')}, with bits allocated (a mean"
        f" of 5) {viditq('+ scaling, rotation, mixed precision')}",
    ]


def _speed_sentences() -> list[str]:
    step = _step()
    ours = step["HTG W8A8 static", "compiled"]
    (profile,) = [
        row["profile"] for row in _step_rows() if (row["name"], row["mode"]) == ("HTG W8A8 static", "compiled")
    ]
    product = next(entry["ms"] for entry in profile["entries"] if entry["name"] == "aten::_int_mm")
    return [
        f"HTG W8A8 is {step['bf16', 'compiled'] / ours:.2f} times as fast as compiled bf16 and"
        f" {step['torchao int8 dynamic', 'compiled'] / ours:.2f} times as torchao's int8",
        f"`torch._int_mm`: {product:.0f} of the {ours:.0f} ms",
    ]


def choosing_sentences() -> list[str]:
    rows = _rows("tables-w4a8-outliers.json")
    wide = _rows("tables-w8a8-w6a8-outliers.json", "W8A8")

    def both(label: str) -> str:
        return f"{rounded(rows[label]['PSNR'], 1)} dB in {rows[label]['bytes'] / 1e6:.2f} MB"

    token = rows["RTN, a token"]
    of_one_size = [row["PSNR"] for name, row in wide.items() if "PSNR" in row and not name.startswith("SVD")]
    all_psnr = [row["PSNR"] for row in rows.values() if "PSNR" in row]
    return [
        f"{both(_BALANCED)}, where plain rounding a token has {rounded(token['PSNR'], 1)} dB in"
        f" {token['bytes'] / 1e6:.2f} MB",
        f"{both(_QUALITY)}: transforms, bits and groups",
        f"{rows[_SPEED]['PSNR']:.2f} dB; HTG's shift",
        f"{rounded(token['PSNR'], 1)} dB at W4A8, {rounded(wide['RTN dynamic']['PSNR'], 1)} dB at W8A8: the floor",
        f"{rounded(rows['AWQ, W4A16']['PSNR'], 1)} dB at W4A16",
        f"from {rounded(min(of_one_size), 1)} dB (`g4w_p4a`) to {rounded(max(of_one_size), 1)} dB (`balanced`)",
        f"from {rounded(min(all_psnr), 1)} dB (`ptq4dm`) to {rounded(max(all_psnr), 1)} dB (`quality`)",
        f"{rows['SVDQuant, rank 32']['bytes'] / 1e6:.2f} MB where plain W4A8 has"
        f" {rows['RTN, static']['bytes'] / 1e6:.2f} MB",
    ]


SENTENCES: Mapping[str, Callable[[], list[str]]] = MappingProxyType(
    {"README.md": readme_sentences, "docs/choosing.md": choosing_sentences}
)
