# SPDX-License-Identifier: Apache-2.0
"""Which tile a matrix product takes: a look-up in tables, one JSON file an architecture.

Shipped tables lie in tiles/. Those of a user, in the directory that the environment variable DIFFUSERS_DQ_TILES names
(read at the first product) or that `use_tiles` is given, come before shipped ones of the same architecture.

    {"format_version": 1,
     "sources": {name: where entries come from and who measured them},
     "ops": {op: [Entry, ...]}}
"""

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "BUCKETS",
    "GENERIC",
    "Entry",
    "Table",
    "Tile",
    "bucket_of",
    "known_ops",
    "look_up",
    "pinned",
    "read_table",
    "shipped_tables",
    "table_name",
    "use_tiles",
]

FORMAT_VERSION = 1
ENVIRONMENT_VARIABLE = "DIFFUSERS_DQ_TILES"
GENERIC = (0, 0)

# Numbers of rows are looked up by the next power of two; more rows than the last go with the last.
BUCKETS = tuple(16 << i for i in range(10))

_SHIPPED = Path(__file__).with_name("tiles")
_LARGEST_BLOCK = 512


class Tile(NamedTuple):
    """What one program computes, and with how much hardware."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Entry(NamedTuple):
    """One line of a table.

    m: bucket. With n and k (out_features and in_features) the entry serves this bucket alone, without them all
    buckets above the one of the entry before.   source: a key of the table's sources.   rows, microseconds,
    shipped_microseconds: of a tuning run: M, the time of `tile` and that of the tile it replaces.
    """

    m: int
    tile: Tile
    source: str
    n: int | None = None
    k: int | None = None
    rows: int | None = None
    microseconds: float | None = None
    shipped_microseconds: float | None = None

    @property
    def key(self) -> tuple[int, int | None, int | None]:
        return self.m, self.n, self.k


class Table(NamedTuple):
    """path: of its file.   architecture: compute capability, (0, 0) is generic.   ops: entries by name of an op."""

    path: Path
    architecture: tuple[int, int]
    sources: Mapping[str, Any]
    ops: Mapping[str, tuple[Entry, ...]]

    def find(self, op: str, bucket: int, n: int, k: int) -> Tile | None:
        entries = self.ops.get(op, ())
        exact = (entry.tile for entry in entries if entry.key == (bucket, n, k))
        general = (entry.tile for entry in entries if entry.n is None and entry.m >= bucket)
        return next(exact, None) or next(general, None)


# Look-up


def table_name(op: str, fp32: bool = False, finish: str = "") -> str:
    """The name under which tables list an op: what comes after the product takes registers from its tile.

    fp32: whether the output is.   finish: "gelu"; "residual", which stands for a gate and a tail in K too; or neither.
    """
    return op + "+fp32" * fp32 + (finish and f"+{finish}")


def bucket_of(m: int) -> int:
    """The bucket of M rows."""
    return min(max(1 << (m - 1).bit_length(), BUCKETS[0]), BUCKETS[-1])


def look_up(op: str, capability: tuple[int, int], m: int, n: int, k: int) -> Tile:
    """The tile for M rows, N out_features and K in_features.

    op: a `table_name`; what follows a "+" is left out, from the last one on, until the architecture has the op.
    Architectures are asked from the newest that is not newer than `capability` down to the generic one.
    KeyError if none of them has the op. Calls with the same bucket are one look-up in a dict: nothing runs twice, and
    a CUDA graph may capture the first call.
    """
    return _pick(op, capability, bucket_of(m), n, k)


@functools.cache
def _pick(op: str, capability: tuple[int, int], bucket: int, n: int, k: int) -> Tile:
    pinned_tile = _PINNED.get(op.partition("+")[0])
    if pinned_tile is not None:
        return pinned_tile
    known = [table for table in (*_user_tables(), *shipped_tables()) if table.architecture <= capability]
    for architecture in sorted({table.architecture for table in known}, reverse=True):
        for name in _from_special_to_general(op):
            for table in known:
                tile = table.find(name, bucket, n, k) if table.architecture == architecture else None
                if tile is not None:
                    return tile
    raise KeyError(f"no tiles for op {op!r}; known: {sorted(known_ops())}. Add it to {_SHIPPED / 'generic.json'}")


def _from_special_to_general(name: str) -> Iterator[str]:
    """a+b+c, a+b, a."""
    while name:
        yield name
        name = name.rpartition("+")[0]


@functools.cache
def known_ops() -> frozenset[str]:
    """Ops of which the generic table has tiles: those of every GPU."""
    return frozenset(op for table in shipped_tables() if table.architecture == GENERIC for op in table.ops)


# What is looked up


# What `use_tiles` last read; empty until then.
_CHOSEN: list[tuple[Table, ...]] = []


def use_tiles(directory: str | os.PathLike[str] | None) -> None:
    """Take the tables in `directory` before the shipped ones of the same architecture; None: the shipped ones alone.

    directory: of files sm_90.json, ... as `python -m diffusers_dq_kernels.tune --output DIRECTORY` writes them. They
    serve every product from now on, of this process, in place of what DIFFUSERS_DQ_TILES names.
    ValueError for a file that cannot be used, which is named, NotADirectoryError for what is no directory,
    FileNotFoundError where there is none or no table in it; then the tables stay those from before.
    """
    path = None if directory is None else Path(directory)
    tables = () if path is None else _read_directory(path)
    _CHOSEN[:] = [tables]
    _forget()


@functools.cache
def shipped_tables() -> tuple[Table, ...]:
    return _read_directory(_SHIPPED)


@functools.cache
def _user_tables() -> tuple[Table, ...]:
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return _CHOSEN[0] if _CHOSEN else _read_directory(Path(named)) if named else ()


def _forget() -> None:
    _pick.cache_clear()
    _user_tables.cache_clear()


_PINNED: dict[str, Tile] = {}


@contextmanager
def pinned(op: str, tile: Tile) -> Iterator[None]:
    """Within, `op` takes `tile` for every size and finish: for the tuner and tests."""
    _PINNED[op] = tile
    _forget()
    try:
        yield
    finally:
        del _PINNED[op]
        _forget()


# Files


def file_name(architecture: tuple[int, int]) -> str:
    return "generic.json" if architecture == GENERIC else f"sm_{architecture[0]}{architecture[1]}.json"


def _read_directory(directory: Path) -> tuple[Table, ...]:
    if not directory.exists():
        raise FileNotFoundError(f"no directory {directory}: expected one with tile tables (sm_90.json, ...)")
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file: expected the directory of tile tables (sm_90.json, ...)")
    paths = sorted(directory.glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"no tile tables (sm_90.json, ...) in {directory}")
    return tuple(map(read_table, paths))


def read_table(path: Path) -> Table:
    """ValueError, with the path, for anything but a whole table of a known format."""
    try:
        return _parse(path, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not a usable tile table: {what}") from error


def write_table(table: Table) -> None:
    """In one step: a reader sees the old file or the new one, also after a power cut. One entry a line."""
    ops = ",\n".join(f"    {json.dumps(op)}: [\n{_lines(entries)}\n    ]" for op, entries in sorted(table.ops.items()))
    sources = ",\n".join(f"    {json.dumps(name)}: {json.dumps(what)}" for name, what in table.sources.items())
    fields = (f'"format_version": {FORMAT_VERSION}', f'"sources": {{\n{sources}\n  }}', f'"ops": {{\n{ops}\n  }}')
    text = "{\n  " + ",\n  ".join(fields) + "\n}\n"
    unfinished = table.path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, table.path)


def _lines(entries: tuple[Entry, ...]) -> str:
    order = sorted(entries, key=lambda entry: (entry.n is not None, entry.n or 0, entry.k or 0, entry.m))
    return ",\n".join(
        f"      {json.dumps({name: value for name, value in entry._asdict().items() if value is not None})}"
        for entry in order
    )


def _parse(path: Path, content: dict[str, Any]) -> Table:
    version = content["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version is {version!r}, but this diffusers_dq_kernels reads {FORMAT_VERSION}")
    sources = content["sources"]
    ops = {op: tuple(_entry(op, item, sources) for item in items) for op, items in content["ops"].items()}
    for op, entries in ops.items():
        _check_order(op, entries)
    return Table(path, _architecture(path), sources, ops)


def _architecture(path: Path) -> tuple[int, int]:
    if path.name == file_name(GENERIC):
        return GENERIC
    match = re.fullmatch(r"sm_(\d+)(\d)\.json", path.name)
    if match is None:
        raise ValueError("its name says no architecture: expected sm_90.json, sm_100.json, ... or generic.json")
    return int(match[1]), int(match[2])


def _entry(op: str, item: dict[str, Any], sources: Mapping[str, Any]) -> Entry:
    entry = Entry(**{**item, "tile": Tile(*item["tile"])})
    blocks, (num_warps, num_stages) = entry.tile[:3], entry.tile[3:]
    if not all(isinstance(value, int) for value in (entry.m, *entry.tile)):
        raise ValueError(f"{op}: expected whole numbers, got {json.dumps(item)}")
    for expected, fits in (
        (f"m one of {BUCKETS}", entry.m in BUCKETS),
        ("both n and k, above 0, or neither", _are_sizes(entry.n, entry.k)),
        (f"block sizes that are powers of two from 16 to {_LARGEST_BLOCK}", all(map(_is_block, blocks))),
        ("1 to 16 warps, a power of two", num_warps in (1, 2, 4, 8, 16)),
        ("1 to 8 stages", num_stages in range(1, 9)),
        (f"a source among {sorted(sources)}", entry.source in sources),
    ):
        if not fits:
            raise ValueError(f"{op}: expected {expected}, got {json.dumps(item)}")
    return entry


def _are_sizes(n: int | None, k: int | None) -> bool:
    return (n is None and k is None) or (isinstance(n, int) and isinstance(k, int) and n > 0 and k > 0)


def _is_block(size: Any) -> bool:
    return isinstance(size, int) and 16 <= size <= _LARGEST_BLOCK and size & (size - 1) == 0


def _check_order(op: str, entries: tuple[Entry, ...]) -> None:
    keys = [entry.key for entry in entries]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{op}: two entries for the same m, n and k")
    general = [entry.m for entry in entries if entry.n is None]
    if general != sorted(general) or (general and general[-1] != BUCKETS[-1]):
        raise ValueError(f"{op}: entries without n and k must rise in m up to {BUCKETS[-1]}, got m = {general}")
