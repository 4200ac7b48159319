# SPDX-License-Identifier: Apache-2.0
"""The tables of the papers, on the model it is given: methods by bits and steps, and the ablations of each paper.

    python examples/tables.py --images 2000 --steps 25 50 --features FILE.py:function --reference REAL.npz
    python examples/tables.py --table htg --bits W4A8 --outliers

Rows are data, in `tables` below. A cell is a model that is quantized in memory, sampled and measured in a folder of
its own: a finished one is not made again, an interrupted one goes on. Delete the output folder after a change of the
code that quantizes. Writes tables.md and tables.json after each cell. `diffusers-dq evaluate --help` says what FILE.py
and REAL.npz may be; without a network only the paired columns are filled.
"""

import argparse
import hashlib
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

import diffusers_dq as dq
from diffusers_dq.evaluation import Extractor, Judges, PictureSet, Sampling, inject_outliers, measure, sample
from diffusers_dq.evaluation.features import INCEPTION
from diffusers_dq.evaluation.figures import check_reference
from diffusers_dq.evaluation.loading import class_labels, load_pipeline, read_prompts
from diffusers_dq.evaluation.provenance import provenance
from diffusers_dq.evaluation.sampling import fingerprint
from diffusers_dq.files import write_json, write_whole

MODEL = Path(__file__).parent / "dit-cifar10"
CALIBRATION_SEED = 1_000_000  # far from the seeds of the pictures that are measured
FULL_PRECISION = "full precision"
GENERATIONS = 5  # of the search for group sizes
COLUMNS = ("FID", "sFID", "IS", "precision", "recall", "FID to full precision", "PSNR", "SSIM")


@dataclass(frozen=True)
class Row:
    """config: keyword arguments of dq.DQConfig, without bits unless the row has its own.   only: the bits it is meant
    for; () for all.   find: what a search adds to the configuration, within the budget of `found`."""

    label: str
    config: Mapping[str, Any]
    only: tuple[str, ...] = ()
    find: Literal["", "group sizes", "bits"] = ""

    @property
    def method(self) -> str:
        """Its name, or its preset's."""
        name: str = self.config.get("method") or self.config["preset"]
        return name


def tables(group_size: int) -> dict[str, tuple[str, list[Row]]]:
    """Name -> title and rows.   group_size: of the group-wise rows; the papers take 128, which is the demo's width."""
    static = dict(method="rtn", dynamic=False)
    main = [
        Row("RTN static", static),
        Row("RTN dynamic", dict(method="rtn")),
        Row("SmoothQuant", dict(method="smoothquant", preset="paper")),
        Row("QuaRot", dict(method="quarot", preset="paper")),
        Row("AWQ, weights only", dict(method="awq", preset="paper", activation_bits=16)),
        Row("PTQ4DM", dict(method="ptq4dm", preset="paper")),
        Row("PTQD", dict(method="ptqd", preset="paper")),
        Row("RepQ", dict(method="repq", preset="paper")),
        Row("Q-Diffusion", dict(method="qdiffusion", preset="paper")),
        Row("TFMQ-DM", dict(method="tfmq", preset="paper")),
        Row("G4W+P4A", dict(method="g4w_p4a", preset="paper", group_size=group_size)),
        Row("PTQ4DiT", dict(method="ptq4dit", preset="paper")),
        Row("HTG", dict(method="htg", preset="paper")),
        Row("Q-DiT", dict(method="qdit", preset="paper", group_size=group_size)),
        Row("ViDiT-Q", dict(method="viditq", preset="paper")),
        Row("SVDQuant, rank 32", dict(method="svdquant", preset="paper")),
        Row("ours: htg, its default here", dict(method="htg")),
        Row("ours: speed", dict(preset="speed")),
        Row("ours: balanced", dict(preset="balanced")),
        Row("ours: quality", dict(preset="quality")),
    ]
    paper_htg = dict(method="htg", preset="paper", quantize_attention=False)
    plain_htg = dict(method="htg", search="mse", output_correction=False)
    htg = [
        Row("none", dict(static, search="mse")),
        Row("+ shift", dict(plain_htg, scale=False)),
        Row("+ scale", dict(plain_htg, shift=False)),
        Row("+ shift, scale", plain_htg),
        Row("the same, to the letter", paper_htg),
        *(Row(f"G = {groups}", dict(plain_htg, groups=groups)) for groups in (1, 5, 10)),
        *(Row(f"alpha = {ema}", dict(plain_htg, ema=ema)) for ema in (0.9, 0.999)),
    ]
    ptq4dit = [
        Row("baseline", dict(static, search="mse")),
        Row("+ CSB", dict(method="ptq4dit", calibrate_salience=False)),
        Row("+ CSB, SSC", dict(method="ptq4dit")),
        Row("+ CSB, SSC of samples", dict(method="ptq4dit", per_sample=True)),
        Row("baseline + AdaRound", dict(static, search="mse", rounding="adaround")),
        Row("+ CSB, SSC, AdaRound", dict(method="ptq4dit", rounding="adaround")),
    ]
    small = min(32, group_size)
    qdit = [
        Row("RTN, static", static),
        Row("+ groups", dict(static, group_size=small)),
        Row("+ groups, dynamic", dict(method="qdit", group_size=small)),
        Row("groups of 64, dynamic", dict(method="qdit", group_size=64)),
        Row("sizes searched, at the BitOps of 64", dict(method="qdit", group_size=64), find="group sizes"),
    ]
    viditq = [
        Row("static, a tensor", static),
        Row("dynamic, a token", dict(method="rtn")),
        Row("+ scaling", dict(method="viditq", rotate=False)),
        Row("+ rotation", dict(method="quarot")),
        Row("+ scaling, rotation", dict(method="viditq")),
        Row("+ scaling, rotation, mixed precision", dict(method="viditq"), find="bits"),
    ]
    return {
        "main": ("Methods", main),
        "htg": ("HTG: its parts, the number of groups G, alpha", htg),
        "ptq4dit": ("PTQ4DiT: its parts", ptq4dit),
        "qdit": ("Q-DiT: its parts", qdit),
        "viditq": ("ViDiT-Q: its parts", viditq),
    }


@dataclass(frozen=True)
class Cell:
    """What a row is at a number of steps and bits.   figures: texts by column.   error: instead of figures.
    source: the commit that made it."""

    label: str
    steps: int
    bits: str
    figures: Mapping[str, str] = field(default_factory=dict)
    nbytes: int | None = None
    error: str = ""
    source: str = ""


class Bench:
    """A model and how it is measured. Everything it makes is in `folder`, under a name that its settings decide."""

    def __init__(self, options: argparse.Namespace, second_moments: bool) -> None:
        self.options, self.folder, self.second_moments = options, options.output, second_moments
        self.reference = PictureSet.open(options.reference) if options.reference else None
        if self.reference is not None:
            check_reference(self.reference)
        self.judges = judges(options)
        pipe = self.load()
        self.classes = class_labels(pipe, options.classes) if options.prompts is None else ()
        self.prompts = [] if options.prompts is None else read_prompts(options.prompts)
        self.model = fingerprint(pipe)

    def load(self) -> DiffusionPipeline:
        pipe = load_pipeline(str(self.options.model), self.options.dtype, self.options.device)
        if self.options.outliers:
            inject_outliers(pipe.transformer)
        return pipe

    def sampling(self, images: int, steps: int) -> Sampling:
        options = self.options
        return Sampling(
            images=images,
            steps=steps,
            batch=options.batch,
            seed=options.seed,
            guidance=options.guidance,
            classes=self.classes,
            prompts=self.prompts,
        )

    def place(self, name: str, *settings: Any) -> Path:
        """Of a cell or a file: other settings, another place."""
        options = self.options
        content = [self.model, options.calibration, options.calibration_batch, options.samples]
        content += [options.batch, options.guidance, *settings]
        text = json.dumps([content, list(self.classes), self.prompts], sort_keys=True)
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return self.folder / f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def statistics(self, steps: int) -> Path:
        """Calibrated once for a number of steps."""
        path = self.place(f"statistics {steps} steps", self.second_moments).with_suffix(".safetensors")
        if not path.exists():
            sampling, size = self.sampling(self.options.calibration, steps), self.options.calibration_batch
            starts = range(0, sampling.images, size)
            calls = [sampling.call(first, min(first + size, sampling.images)) for first in starts]
            statistics = dq.calibrate(
                self.load(),
                calls,
                num_inference_steps=steps,
                seed=CALIBRATION_SEED,
                second_moments=self.second_moments,
                samples=self.options.samples,
                checkpoint=path.with_suffix(".checkpoint"),
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            statistics.save(path)
        return path

    def full_precision(self, steps: int) -> Cell:
        return self._measured(FULL_PRECISION, steps, "", self._full_place(steps), self.load, None)

    def _full_place(self, steps: int) -> Path:
        return self.place(f"{steps} {FULL_PRECISION}", self.options.images, self.options.seed, steps)

    def quantized(self, row: Row, steps: int, bits: str) -> Cell:
        """One cell; an error is its content, not the end of the table."""
        config = {**_bits(bits), **row.config}
        name = f"{steps} {bits} {row.method}"  # rows of several tables that are one configuration share it
        place = self.place(name, self.options.images, self.options.seed, steps, config, *([row.find] * bool(row.find)))

        def load() -> DiffusionPipeline:
            pipe, checked = self.load(), dq.DQConfig(**config)
            if row.find:
                checked = self.found(row.find, pipe, checked, steps, place)
            learning = place / "learning.safetensors"
            place.mkdir(parents=True, exist_ok=True)
            dq.quantize(pipe, checked, statistics=self.statistics(steps), checkpoint=learning)
            return pipe

        try:
            return self._measured(
                row.label, steps, bits, place, load, PictureSet.open(self._full_place(steps) / "set")
            )
        except Exception as error:  # of a method under work: hours of other cells wait behind this one
            traceback.print_exc()
            return Cell(row.label, steps, bits, error=f"{type(error).__name__}: {str(error).splitlines()[0]}")

    def found(self, what: str, pipe: DiffusionPipeline, config: dq.DQConfig, steps: int, place: Path) -> dq.DQConfig:
        """The configuration with group sizes of the BitOps of its own, or bits of a mean of one more; kept as JSON."""
        statistics = dq.Statistics.load(self.statistics(steps))
        place.mkdir(parents=True, exist_ok=True)
        checkpoint = place / "search.json"
        if what == "bits":
            budget = config.weight_bits + 1.0
            config = dq.allocate_bits(
                pipe, config, statistics, budget=budget, bits=(4, 6, 8), mode="decoupled", checkpoint=checkpoint
            )
        else:
            config = dq.search_group_sizes(
                pipe,
                config,
                [self.sampling(4, steps).call(0, 4)],
                num_inference_steps=10,
                statistics=statistics,
                limit=dq.search.BitOpsOf(config.group_size or 64),
                population=16,
                generations=GENERATIONS,
                seed=CALIBRATION_SEED,
                checkpoint=checkpoint,
            )
        config.to_json_file(place / "found.json")
        return config

    def _measured(self, label: str, steps: int, bits: str, place: Path, load: Any, full: PictureSet | None) -> Cell:
        key = self._judged()
        path = place / "cell.json"
        if path.exists() and (found := json.loads(path.read_text()))["judged"] == key:
            return Cell(label, steps, bits, found["figures"], found["nbytes"], source=_source(found))
        start = time.perf_counter()
        pipe = load()
        nbytes = transformer_bytes(pipe)
        size = self.reference.size if self.reference else None
        pictures = sample(pipe, self.sampling(self.options.images, steps), place / "set", size=size)
        figures = measure(pictures, self.judges, reference=self.reference, twin=full)
        texts = {name: figures.text(name) for name in figures.values}
        if full is not None and self.judges.extractor is not None:
            to_full = measure(pictures, self.judges, reference=full)
            texts["FID to full precision"] = to_full.text("FID")
        content = dict(judged=key, figures=texts, nbytes=nbytes, exact=figures.to_dict(), settings=pictures.settings)
        content |= dict(seconds=time.perf_counter() - start, **provenance(str(pipe.device)))
        write_json(path, content)
        return Cell(label, steps, bits, texts, nbytes, source=_source(content))

    def _judged(self) -> list[Any]:
        """What the figures depend on besides the pictures."""
        reference = None if self.reference is None else [str(self.reference.place), self.reference.stamp()]
        return [reference, None if self.judges.extractor is None else self.judges.extractor.key]


def judges(options: argparse.Namespace) -> Judges:
    """With a network, else with the reason why there is none; one that was asked for by name must be there."""
    common: dict[str, Any] = dict(device=options.device, batch=options.batch)
    try:
        return Judges(extractor=Extractor.load(options.features or INCEPTION), **common)
    except ValueError as error:
        if options.features:
            raise
        return Judges(why_no_features=str(error), **common)


def transformer_bytes(pipe: DiffusionPipeline) -> int:
    """What `save_pretrained` writes for the transformer's weights."""
    with tempfile.TemporaryDirectory() as folder:
        pipe.transformer.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _source(content: Mapping[str, Any]) -> str:
    return f"{(content['commit'] or 'unknown')[:12]}{' with changes' if content['dirty'] else ''}"


def _bits(text: str) -> dict[str, int]:
    """W4A8 -> weight_bits=4, activation_bits=8."""
    found = re.fullmatch(r"W(\d+)A(\d+)", text)
    if found is None:
        raise ValueError(f"bits are written as W4A8, got {text!r}")
    return dict(weight_bits=int(found[1]), activation_bits=int(found[2]))


def markdown(title: str, cells: Sequence[Cell], notes: Sequence[str]) -> str:
    """A table a number of steps; rows in the order they were made."""
    lines = [f"## {title}", ""]
    for steps in dict.fromkeys(cell.steps for cell in cells):
        lines += [f"### {steps} steps", "", "| bits | method | transformer MB | " + " | ".join(COLUMNS) + " |"]
        lines += ["|---|---" + "|---:" * (1 + len(COLUMNS)) + "|"]
        lines += [_line(cell) for cell in cells if cell.steps == steps]
        lines += [""]
    return "\n".join([*lines, *(f"- {note}" for note in notes), ""])


def _line(cell: Cell) -> str:
    if cell.error:
        return f"| {cell.bits} | {cell.label}: {cell.error.replace('|', '/')} |" + " |" * (1 + len(COLUMNS))
    size = "" if cell.nbytes is None else f"{cell.nbytes / 1e6:.2f}"
    figures = " | ".join(cell.figures.get(name, "") for name in COLUMNS)
    return f"| {cell.bits or 'full'} | {cell.label} | {size} | {figures} |"


def notes(bench: Bench, cells: Sequence[Cell]) -> list[str]:
    options, judge = bench.options, bench.judges
    lines = [
        f"Model {options.model}{', outliers injected' if options.outliers else ''}, {options.dtype}, {options.images}"
        f" pictures a row with seeds {options.seed} to {options.seed + options.images - 1}, guidance"
        f" {options.guidance}, calibrated on {options.calibration} other pictures.",
        "PSNR in dB and SSIM are means over pictures, to the full-precision pictures of the same seeds.",
    ]
    if judge.extractor is None:
        lines.append(f"Only paired columns: {judge.why_no_features}")
    elif bench.reference is None:
        lines.append("FID, sFID, precision and recall need --reference; IS is of the pictures alone.")
    if judge.extractor is not None:
        lines.append(
            f"Features: {judge.extractor.name}; figures of other networks are not comparable, nor are those of another"
            f" number of pictures: FID of {options.images} is biased upwards."
        )
    sources = ", ".join(sorted({cell.source for cell in cells if cell.source}))
    return [*lines, f"Made by commit {sources}."]


def write(bench: Bench, done: Mapping[str, tuple[str, list[Cell]]]) -> str:
    text = "\n".join(markdown(title, cells, notes(bench, cells)) for title, cells in done.values())
    write_whole(bench.folder / "tables.md", lambda file: file.write(text.encode()))
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(bench.options).items()}
    content = {name: [vars(cell) for cell in cells] for name, (_, cells) in done.items()}
    write_json(
        bench.folder / "tables.json", {"options": options, **provenance(bench.options.device), "tables": content}
    )
    return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = list(tables(128))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="folder or Hub name of a pipeline in full precision")
    parser.add_argument("--table", nargs="+", choices=names, default=["main"], help="; ".join(names))
    parser.add_argument("--images", type=int, default=2000, help="pictures a row")
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 50])
    parser.add_argument("--bits", nargs="+", default=["W8A8", "W6A8", "W4A8"])
    parser.add_argument("--methods", nargs="+", help="only rows of these methods, as dq.methods() names them")
    parser.add_argument("--skip", nargs="+", default=[], help="no rows whose label contains this, as GPTQ or AdaRound")
    parser.add_argument("--group-size", type=int, default=128, help="of the group-wise rows")
    parser.add_argument("--outliers", action="store_true", help="give the model the channel outliers of a large one")
    parser.add_argument("--features", default="", help="inception (default), or path/to/file.py:function")
    parser.add_argument("--reference", help="real pictures: folder or .npz")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--classes", type=int, help="by default the pipeline's own labels")
    parser.add_argument("--prompts", type=Path, help="text file, a prompt a line")
    parser.add_argument("--calibration", type=int, default=64, help="pictures to calibrate on")
    parser.add_argument(
        "--calibration-batch", type=int, default=4, help="pictures of a call; rounding learns on calls"
    )
    parser.add_argument("--samples", type=int, default=100, help="steps of all calibration that learning and fits see")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("tables_output"))
    return parser.parse_args(arguments)


def _chosen(title: str, rows: Sequence[Row], options: argparse.Namespace) -> tuple[str, list[Row]]:
    methods = options.methods
    rows = [row for row in rows if not methods or row.method in methods]
    rows = [row for row in rows if not any(text.lower() in row.label.lower() for text in options.skip)]
    if not rows:
        raise ValueError(f"the table {title!r} has no row that --methods and --skip leave")
    return title, rows


def _learns(row: Row) -> bool:
    """Whether the row needs second moments."""
    try:
        return dq.DQConfig(**row.config).recipe.rounding == "gptq"
    except (TypeError, ValueError):  # its cells will say so
        return False


def run(options: argparse.Namespace) -> str:
    """Makes all cells and returns the markdown. Raises ValueError for options that cannot be."""
    for bits in options.bits:
        dq.DQConfig("rtn", **_bits(bits))
    chosen = {name: _chosen(*tables(options.group_size)[name], options) for name in options.table}
    bench = Bench(options, any(_learns(row) for _, rows in chosen.values() for row in rows))
    done: dict[str, tuple[str, list[Cell]]] = {}
    text = ""
    for name, (title, rows) in chosen.items():
        cells: list[Cell] = []
        done[name] = (title, cells)
        for steps in options.steps:
            cells.append(bench.full_precision(steps))
            for bits in options.bits:
                for row in (row for row in rows if not row.only or bits in row.only):
                    print(f"{name}: {steps} steps, {bits}, {row.label}", flush=True)
                    cells.append(bench.quantized(row, steps, bits))
                    text = write(bench, done)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        print(run(options) + f"\nwritten: {options.output / 'tables.md'}, tables.json")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
