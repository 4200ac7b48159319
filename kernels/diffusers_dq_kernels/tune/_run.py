# SPDX-License-Identifier: Apache-2.0
"""The run: of each task the fastest usable tile, noted in the table with where it was measured.

The table is written after every task, so that an interrupted run goes on where it was.
"""

import datetime
import functools
import itertools
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import _triton
from .._tiles import Entry, Table, file_name, look_up, read_table, use_tiles, write_table
from ._candidates import candidates
from ._machines import Machine
from ._problems import Task

__all__ = ["tune"]

# A tile replaces the shipped one if its time is at most this part of it: every further tile is a compilation.
_WORTH = 0.98


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
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _commit() -> str:
    """Of the checkout this file is in, "unknown" where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
