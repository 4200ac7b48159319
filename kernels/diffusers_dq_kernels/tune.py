# SPDX-License-Identifier: Apache-2.0
"""Time tiles on the present GPU and write a table of the fastest: an opt-in, since the shipped tables serve any size.

    python -m diffusers_dq_kernels.tune --models dit-xl-2-256,flux --output my_tiles
    python -m diffusers_dq_kernels.tune --op linear_w8a8 --shapes 4096x1152x1152,4096x4608x1152:gelu --output my_tiles
    DIFFUSERS_DQ_TILES=my_tiles python generate.py

A shape is MxNxK: rows, out_features and in_features, then :gelu or :residual (gate and residual) where that follows
the product. Sizes that the table in the output directory already has are kept, so an interrupted run goes on where it
was. --dry-run does all of it without a GPU, with made-up times.
"""

import argparse
import datetime
import functools
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import _triton
from ._epilogue import Epilogue
from ._gemm import table_of
from ._library import _FORMS
from ._tiles import Entry, Table, Tile, bucket_of, file_name, look_up, pinned, read_table, use_tiles, write_table
from .packing import unpack_int4

__all__ = ["MODELS", "PROBLEMS", "candidates", "main"]

# A tile replaces the shipped one if its time is at most this part of it: every further tile is a compilation.
_WORTH = 0.98
_WARM_UPS, _REPETITIONS = 3, 30
_FLUSHED_BYTES = 256 << 20  # more than any L2 cache
# The GPU waits this long before a timed call, so that Python has queued all of it: about half a millisecond.
_HEAD_START_CYCLES = 1_000_000


class Size(NamedTuple):
    """M rows, N out_features, K in_features.   finish: "", "gelu" or "residual"."""

    m: int
    n: int
    k: int
    finish: str = ""

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}" + (self.finish and f":{self.finish}")


# What is timed


@dataclass(frozen=True)
class Problem:
    """How to call an op. weight_only: x is bf16; else int8 with a static scale."""

    bits: int
    weight_only: bool = False

    def arguments(self, size: Size, device: str, exact: bool = False) -> tuple[Any, ...]:
        """Random ones. exact: the result is `expected`, to the bit."""
        g = torch.Generator(device).manual_seed(0)
        m, n, k, finish = size
        x = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device, generator=g)
        bytes_ = torch.randint(-128, 128, (n, k * self.bits // 8), dtype=torch.int8, device=device, generator=g)
        weight = bytes_ if self.bits == 8 else bytes_.view(torch.uint8)
        scale, group = torch.ones(n, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        gate = residual = None
        if finish == "residual" and not exact:
            gate = torch.ones(1, n, dtype=torch.bfloat16, device=device)
            residual = torch.ones(m, n, dtype=torch.bfloat16, device=device)
        last = (gate, residual, "gelu_tanh" if finish == "gelu" and not exact else "none")
        bias = None if exact else torch.ones(1, n, device=device)
        if self.weight_only:
            # exact: sums of whole numbers that fp32 holds
            return (x % 4 if exact else x).bfloat16(), weight, scale, bias, group, *last
        table = (torch.ones(1, device=device), torch.ones(1, dtype=torch.int32, device=device))
        weight_sum = torch.ones(n, dtype=torch.int32, device=device)
        return x, weight, scale, *table, weight_sum, bias, group, torch.int32 if exact else torch.bfloat16, *last

    def expected(self, arguments: tuple[Any, ...]) -> Tensor:
        x, weight = arguments[:2]
        sums = x.double() @ (unpack_int4(weight) if self.bits == 4 else weight).double().t()
        return sums.bfloat16() if self.weight_only else (sums - 1).int()  # zero point and sum of the weight are 1

    def table_of(self, op: str, size: Size) -> str:
        last = (None, torch.ones(0) if size.finish == "residual" else None)
        activation = "gelu_tanh" if size.finish == "gelu" else "none"
        nothing = torch.ones(0)
        epilogue = Epilogue(nothing, None, None, None, None, nothing, torch.bfloat16, *last, activation)
        return table_of(op, size.k, epilogue)


PROBLEMS = {
    "linear_w8a8": Problem(8),
    "linear_w4a8": Problem(4),
    "linear_w8a16": Problem(8, weight_only=True),
    "linear_w4a16": Problem(4, weight_only=True),
}


def _block(m: int, width: int, inner: int) -> tuple[Size, ...]:
    """Query, key and value; attention's output; the two of the feed-forward."""
    return (
        Size(m, width, width),
        Size(m, width, width, "residual"),
        Size(m, inner, width, "gelu"),
        Size(m, width, inner, "residual"),
    )


# Guided models run a batch of two. First the linears of tokens, then those of modulation, which are weight-only.
MODELS: dict[str, tuple[tuple[Size, ...], tuple[Size, ...]]] = {
    "dit-xl-2-256": (_block(2 * 256, 1152, 4608), (Size(2, 6 * 1152, 1152),)),
    "dit-xl-2-512": (_block(2 * 1024, 1152, 4608), (Size(2, 6 * 1152, 1152),)),
    # with 300 tokens of text
    "pixart-sigma-1024": ((*_block(2 * 4096, 1152, 4608), Size(2 * 300, 1152, 1152)), (Size(2, 6 * 1152, 1152),)),
    # Open-Sora 1.0, 16 frames of 256 x 256, with 120 tokens of text
    "stdit": ((*_block(2 * 16 * 256, 1152, 4608), Size(2 * 120, 1152, 1152)), (Size(2, 6 * 1152, 1152),)),
    # FLUX.1 at 1024 x 1024 with 512 tokens of text: blocks of two streams, then blocks of one
    "flux": (
        (
            *_block(4096, 3072, 12288),
            *_block(512, 3072, 12288),
            Size(4608, 3072, 3072),
            Size(4608, 12288, 3072, "gelu"),
            Size(4608, 3072, 15360, "residual"),
        ),
        (Size(1, 6 * 3072, 3072), Size(1, 3 * 3072, 3072)),
    ),
}


# Candidates: block_m, block_n, block_k, num_warps, num_stages. Those of gemlite's and LightX2V's published tables, and
# of ours, that neither spill nor pass the architecture's shared memory when compiled ahead.

_SMALL = ((16, 128, 128, 4, 4), (32, 128, 128, 4, 4), (64, 64, 128, 4, 4), (64, 128, 128, 4, 4))
_INTEGER: dict[tuple[int, int], tuple[tuple[int, ...], ...]] = {
    (8, 0): (
        *_SMALL,
        (128, 64, 128, 8, 4),
        (128, 128, 64, 4, 4),
        (128, 128, 64, 8, 4),
        (128, 128, 128, 8, 3),
        (128, 256, 64, 8, 3),
        (256, 128, 64, 8, 3),
    ),
    (8, 6): (
        *_SMALL,
        (128, 64, 128, 8, 3),
        (128, 128, 64, 4, 4),
        (128, 128, 64, 8, 4),
        (128, 128, 128, 8, 3),
        (128, 256, 64, 8, 4),
        (256, 128, 64, 8, 4),
    ),
    (9, 0): (
        *_SMALL,
        (64, 256, 128, 4, 4),
        (128, 128, 128, 8, 4),
        (128, 128, 128, 8, 5),
        (128, 256, 128, 8, 3),
        (128, 256, 128, 8, 4),
        (128, 256, 64, 8, 5),
        (256, 128, 128, 8, 3),
        (256, 128, 128, 8, 4),
    ),
    (10, 0): (
        *_SMALL,
        (64, 64, 128, 8, 4),
        (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 3),
        (128, 128, 128, 8, 4),
        (128, 256, 64, 8, 4),
        (256, 128, 64, 8, 4),
    ),
}
_INTEGER[12, 0] = _INTEGER[8, 6]
_WEIGHT_ONLY = (
    (16, 32, 128, 4, 4),
    (16, 64, 64, 4, 5),
    (16, 64, 128, 4, 3),
    (16, 64, 128, 4, 4),
    (16, 128, 128, 4, 3),
    (32, 64, 64, 4, 4),
    (64, 64, 64, 8, 3),
    (64, 128, 32, 4, 3),
    (128, 128, 32, 8, 3),
)
# Accumulators of a thread that leave registers for what follows the product.
_MOST_ACCUMULATORS = {"": 128, "gelu": 128, "residual": 64}
# Found when compiled ahead: a static scale with GELU spills 8 to 24 bytes.
_SPILLS: dict[tuple[tuple[int, int], str], tuple[tuple[int, ...], ...]] = {
    ((9, 0), "linear_w8a8+gelu"): ((64, 256, 128, 4, 4), (128, 256, 128, 8, 3), (128, 256, 128, 8, 4)),
    ((10, 0), "linear_w8a8+gelu"): ((128, 256, 64, 8, 4),),
}


def candidates(name: str, capability: tuple[int, int]) -> list[Tile]:
    """For the op that tables list under `name`, on this compute capability."""
    op, _, finish = name.partition("+")
    known = max((known for known in _INTEGER if known <= capability), default=(8, 0))
    listed = _WEIGHT_ONLY if PROBLEMS[op].weight_only else _INTEGER[known]
    dropped = _SPILLS.get((known, name), ())
    most = _MOST_ACCUMULATORS[finish]
    return [Tile(*tile) for tile in listed if tile[0] * tile[1] <= 32 * tile[3] * most and tile not in dropped]


# On what


class Machine(Protocol):
    """name: of the GPU.   device: of tensors.   capability: of which tiles are tried."""

    name: str
    device: str
    capability: tuple[int, int]

    def objection(self, op: str, size: Size, tile: Tile) -> str | None:
        """Why `tile` cannot be used, or None."""

    def microseconds(self, op: str, size: Size, tiles: Sequence[Tile]) -> dict[Tile, float]:
        """The median time of each."""


class Gpu:
    """The present one. RuntimeError if there is none."""

    device = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA GPU: tiles can be timed only on the GPU they are for (--dry-run needs none)")
        if _triton.MISSING is not None:
            raise RuntimeError(f"{_triton.MISSING}: there is nothing to tune")
        self.name, self.capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()

    def objection(self, op: str, size: Size, tile: Tile) -> str | None:
        try:
            with pinned(op, tile), _launched() as kernels:
                exact = _is_exact(op, size, self.device, _launcher(op))
                self._call(op, size)()
            torch.cuda.synchronize()
        except _triton.triton.runtime.errors.TritonError as error:  # shared memory, or what ptxas refuses
            return str(error)
        spills = max(kernel.n_spills for kernel in kernels)
        if spills:
            return f"spills {spills} registers"
        return None if exact else "its result is wrong"

    def microseconds(self, op: str, size: Size, tiles: Sequence[Tile]) -> dict[Tile, float]:
        """Interleaved, so that a change of clocks meets all of them, each after a flush of the L2 cache."""
        call = self._call(op, size)
        flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=self.device)
        times: dict[Tile, list[float]] = {tile: [] for tile in tiles}
        for repetition in range(-_WARM_UPS, _REPETITIONS):
            for tile in tiles:
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                with pinned(op, tile):
                    flushed.zero_()
                    torch.cuda._sleep(_HEAD_START_CYCLES)
                    start.record()
                    call()
                    stop.record()
                torch.cuda.synchronize()
                if repetition >= 0:
                    times[tile].append(1000 * start.elapsed_time(stop))
        return {tile: median(of_tile) for tile, of_tile in times.items()}

    def _call(self, op: str, size: Size) -> Callable[[], Tensor]:
        arguments, launcher = PROBLEMS[op].arguments(size, self.device), _launcher(op)
        return lambda: launcher(*arguments)


class DryRun:
    """A pretended sm_90 whose times are made up. Results are still checked, of a small product on the CPU."""

    name, device, capability = "dry run: times are made up", "cpu", (9, 0)

    def objection(self, op: str, size: Size, tile: Tile) -> str | None:
        small = size._replace(m=min(size.m, 16), n=min(size.n, 32), k=min(size.k, 64))
        # Triton's interpreter multiplies bits of bf16.
        interpreted = _triton.MISSING is None and _triton.triton.knobs.runtime.interpret
        through_triton = interpreted and not PROBLEMS[op].weight_only
        form = _launcher(op) if through_triton else getattr(torch.ops.diffusers_dq, op).default
        with pinned(op, tile):
            return None if _is_exact(op, small, self.device, form) else "its result is wrong"

    def microseconds(self, op: str, size: Size, tiles: Sequence[Tile]) -> dict[Tile, float]:
        return {
            tile: sum(size[:3]) / 100 + abs(tile.block_m - min(size.m, 128)) + 1000 / tile.block_n for tile in tiles
        }


def _is_exact(op: str, size: Size, device: str, form: Callable[..., Tensor]) -> bool:
    arguments = PROBLEMS[op].arguments(size, device, exact=True)
    return torch.equal(form(*arguments), PROBLEMS[op].expected(arguments))


def _launcher(op: str) -> Callable[..., Tensor]:
    launcher = _FORMS[op].triton
    assert launcher is not None
    return launcher


@contextmanager
def _launched() -> Iterator[list[Any]]:
    """Of every launch within, the compiled kernel."""
    function, kernels = _triton.triton.runtime.jit.JITFunction, []
    run = function.run

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, **kwargs))
        return kernels[-1]

    function.run = noting
    try:
        yield kernels
    finally:
        function.run = run


# The run


class Task(NamedTuple):
    op: str
    size: Size

    @property
    def table(self) -> str:
        return PROBLEMS[self.op].table_of(self.op, self.size)

    @property
    def key(self) -> tuple[int, int, int]:
        return bucket_of(self.size.m), self.size.n, self.size.k

    def __str__(self) -> str:
        return f"{self.op} {self.size}"


def tune(machine: Machine, tasks: Sequence[Task], output: Path, say: Callable[[str], None] = print) -> Table:
    """Writes the table of `machine` in the directory `output` after every size, and returns it."""
    use_tiles(None)  # the times of shipped tiles are what others are compared with
    output.mkdir(parents=True, exist_ok=True)
    path = output / file_name(machine.capability)
    table = read_table(path) if path.exists() else Table(path, machine.capability, {}, {})
    run = next(name for i in itertools.count(1) if (name := f"run {i}, {machine.name}") not in table.sources)
    for i, task in enumerate(tasks, 1):
        where = f"[{i}/{len(tasks)}] {task}"
        entries = {entry.key: entry for entry in table.ops.get(task.table, ())}
        known = entries.get(task.key)
        if known is not None and known.microseconds is not None:
            say(f"{where}: known from M = {known.rows}, {known.microseconds:.1f} us")
            continue
        entry = _fastest(machine, task, run, functools.partial(_say_of, say, where))
        if entry is None:
            continue
        entries[task.key] = entry
        ops = {**table.ops, task.table: tuple(entries.values())}
        used = {entry.source for listed in ops.values() for entry in listed}
        sources = {**table.sources, run: _provenance(machine)}
        table = table._replace(sources={name: sources[name] for name in sources if name in used}, ops=ops)
        write_table(table)
    return table


def _say_of(say: Callable[[str], None], where: str, text: str) -> None:
    say(f"{where}: {text}")


def _fastest(machine: Machine, task: Task, run: str, say: Callable[[str], None]) -> Entry | None:
    bucket, n, k = task.key
    shipped = look_up(task.table, machine.capability, bucket, n, k)
    tried = [tile for tile in candidates(task.table, machine.capability) if tile.block_m <= max(16, 2 * bucket)]
    objections = {tile: machine.objection(task.op, task.size, tile) for tile in dict.fromkeys([shipped, *tried])}
    usable = [tile for tile, objection in objections.items() if objection is None]
    for tile, objection in objections.items():
        if objection is not None:
            say(f"{tuple(tile)} left out: {objection}")
    if not usable:
        say("no usable tile")
        return None
    times = machine.microseconds(task.op, task.size, usable)
    best = min(usable, key=times.__getitem__)
    if shipped in times and times[best] > _WORTH * times[shipped]:
        best = shipped
    before = times.get(shipped)
    say(f"{tuple(best)} {times[best]:.1f} us, shipped {'unusable' if before is None else f'{before:.1f} us'}")
    of_shipped = None if before is None else round(before, 2)
    return Entry(bucket, best, run, n, k, task.size.m, round(times[best], 2), of_shipped)


def _provenance(machine: Machine) -> dict[str, str]:
    return {
        "gpu": machine.name,
        "torch": torch.__version__,
        "triton": "none" if _triton.MISSING else str(_triton.triton.__version__),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _commit() -> str:
    """Of the checkout this file is in, "unknown" where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# The command line


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        tasks = _tasks(options.op, options.shapes, options.models)
        machine = DryRun() if options.dry_run else Gpu()
        objection = _objection_to(options.output, file_name(machine.capability))
        if objection is not None:
            print(f"error: --output {options.output}: {objection}", file=sys.stderr)
            return 2
        table = tune(machine, tasks, options.output)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {table.path}: use it with DIFFUSERS_DQ_TILES={options.output}")
    return 0


def _objection_to(output: Path, table: str) -> str | None:
    """Why the file `table` could not be written in `output`, or None. Leaves nothing behind and changes no file."""
    missing: list[Path] = []
    try:
        if output.exists() and not output.is_dir():
            return "is not a directory; give the directory of the tables"
        path = output / table
        if path.exists() and not (path.is_file() and os.access(path, os.R_OK | os.W_OK)):
            return f"{table} in it is not a file that you may read and write; give another directory"
        missing += [folder for folder in (output, *output.parents) if not folder.exists()]
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output):
            return None
    except OSError as error:
        return f"cannot be written to ({error.strerror}); give a directory that you may write to"
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m diffusers_dq_kernels.tune", description=(__doc__ or "").strip())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", action="append", choices=PROBLEMS, help="may be given several times; all without it")
    parser.add_argument("--shapes", type=_listed, default=[], help="MxNxK[:gelu|:residual],...")
    parser.add_argument("--models", type=_listed, default=[], help=f"the sizes of: {', '.join(MODELS)}")
    parser.add_argument("--output", type=Path, required=True, help="directory of tables")
    parser.add_argument("--dry-run", action="store_true", help="no GPU, made-up times")
    return parser


def _listed(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


def _tasks(ops: Sequence[str] | None, shapes: Sequence[str], models: Sequence[str]) -> list[Task]:
    """Given shapes for every op; of a model the linears of tokens for integer ops, its others for the rest."""
    unknown = [model for model in models if model not in MODELS]
    if unknown or not (shapes or models):
        given = f"got {', '.join(unknown)}" if unknown else "got neither --shapes nor --models"
        raise ValueError(f"--models: expected some of {', '.join(MODELS)}; {given}")
    given_sizes = [parse_size(shape) for shape in shapes]
    tasks = []
    for op in ops or PROBLEMS:
        of_models = [size for model in models for size in MODELS[model][PROBLEMS[op].weight_only]]
        tasks += [Task(op, size) for size in (*given_sizes, *of_models)]
    return list({(task.table, task.key): task for task in reversed(tasks)}.values())[::-1]


def parse_size(text: str) -> Size:
    """ValueError for sizes that take no tile from a table."""
    shape, _, finish = text.partition(":")
    try:
        m, n, k = map(int, shape.split("x"))
    except ValueError:
        raise ValueError(f"--shapes: expected MxNxK, got {text!r}") from None
    if finish not in ("", "gelu", "residual"):
        raise ValueError(f"--shapes: expected :gelu or :residual after the sizes, got {text!r}")
    if m < 1 or n < 1 or k < 1 or n % 16 or k % 32:
        raise ValueError(f"--shapes: expected N a multiple of 16 and K of 32 (others take a fixed tile), got {text!r}")
    return Size(m, n, k, finish)


if __name__ == "__main__":
    sys.exit(main())
