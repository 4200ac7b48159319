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
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .._tiles import file_name
from ._machines import DryRun, Gpu
from ._problems import MODELS, PROBLEMS, Task, parse_size
from ._run import tune

__all__ = ["main"]


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
