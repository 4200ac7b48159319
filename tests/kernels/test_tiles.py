# SPDX-License-Identifier: Apache-2.0
"""Tile tables: every product finds a tile, and a table that cannot be used says why."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffusers_dq_kernels
from diffusers_dq_kernels import _epilogue, _gemm, _library, _tiles
from diffusers_dq_kernels._tiles import BUCKETS, Entry, Table, Tile, bucket_of, look_up, shipped_tables, table_name

CAPABILITIES = ((0, 0), (7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (20, 0))
NAMES = [
    table_name(op, fp32, finish)
    for op in ("linear_w8a8", "linear_w4a8", "linear_w8a16", "linear_w4a16")
    for fp32 in (False, True)
    for finish in ("", "gelu", "residual")
]
SMALL, LARGE = [16, 16, 32, 1, 2], [256, 64, 32, 16, 3]

sizes = st.integers(1, 100_000)
names = st.sampled_from(NAMES)
capabilities = st.sampled_from(CAPABILITIES)


@pytest.fixture(autouse=True)
def shipped_alone() -> Iterator[None]:
    _tiles.use_tiles(None)
    yield
    _tiles._CHOSEN.clear()
    _tiles._forget()


def write(path: Path, ops: dict[str, Any], **changes: Any) -> Path:
    path.write_text(json.dumps({"format_version": 1, "sources": {"here": "a test"}, "ops": ops, **changes}))
    return path


def entry(tile: list[int], m: int = 8192, **more: Any) -> dict[str, Any]:
    return {"m": m, "tile": tile, "source": "here", **more}


@given(name=names, capability=capabilities, m=sizes, n=sizes, k=sizes)
def test_every_size_has_a_tile(name: str, capability: tuple[int, int], m: int, n: int, k: int) -> None:
    tile = look_up(name, capability, m, n, k)
    assert all(block >= 16 and block & (block - 1) == 0 for block in tile[:3])
    assert tile.num_warps in (1, 2, 4, 8, 16) and 1 <= tile.num_stages <= 8


@given(name=names, capability=capabilities, m=sizes, n=sizes, k=sizes)
def test_the_bucket_is_all_that_counts_of_m(name: str, capability: tuple[int, int], m: int, n: int, k: int) -> None:
    assert look_up(name, capability, m, n, k) == look_up(name, capability, bucket_of(m), n, k)


@given(m=sizes, more=sizes)
def test_buckets_rise_and_hold_their_rows(m: int, more: int) -> None:
    assert bucket_of(m) <= bucket_of(m + more) and bucket_of(m) in BUCKETS
    assert m <= bucket_of(m) or bucket_of(m) == BUCKETS[-1]
    assert bucket_of(m) == BUCKETS[0] or 2 * m > bucket_of(m)


@given(capability=capabilities, name=names, m=sizes)
def test_more_rows_never_take_a_smaller_tile(capability: tuple[int, int], name: str, m: int) -> None:
    small, large = (look_up(name, capability, rows, 1136, 2304) for rows in (m, 2 * m))
    assert small.block_m * small.block_n <= large.block_m * large.block_n


def test_few_tiles_an_architecture() -> None:
    """Each is a compilation, for each finish it is used with."""
    for capability in CAPABILITIES:
        for name in NAMES:
            assert len({look_up(name, capability, m, 1136, 2304) for m in BUCKETS}) <= 4


def test_an_unlisted_gpu_takes_the_next_lower_one() -> None:
    for unlisted, listed in (((7, 5), (0, 0)), ((8, 7), (8, 6)), ((10, 3), (10, 0)), ((12, 1), (12, 0))):
        assert all(
            look_up(name, unlisted, m, 8, 8) == look_up(name, listed, m, 8, 8) for name in NAMES for m in BUCKETS
        )


def test_smaller_memories_take_nothing_from_larger_ones() -> None:
    """sm_120 has less shared memory than sm_100 and sm_90: its own table must have every op."""
    ops = {table.architecture: {name.partition("+")[0] for name in table.ops} for table in shipped_tables()}
    assert ops[12, 0] == ops[0, 0] == {name.partition("+")[0] for name in NAMES}


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (12, 0), (12, 1), (0, 0)])
def test_int8_tiles_fit_in_99_kib(capability: tuple[int, int]) -> None:
    """The operands of all stages, which is all of a product's shared memory; the generic ones in 48."""
    for name in NAMES:
        if "a16" not in name:
            for m in BUCKETS:
                tile = look_up(name, capability, m, 1136, 2304)
                used = (tile.block_m + tile.block_n) * tile.block_k * tile.num_stages
                assert used <= (99 if capability > (0, 0) else 48) << 10


def test_a_finish_never_takes_the_tile_of_an_older_gpu_that_has_it(tmp_path: Path) -> None:
    write(tmp_path / "sm_80.json", {"op": [entry(LARGE)], "op+gelu": [entry(LARGE)]})
    write(tmp_path / "sm_90.json", {"op": [entry(SMALL)]})
    _tiles.use_tiles(tmp_path)
    assert look_up("op+gelu", (9, 0), 64, 16, 16) == look_up("op+fp32+gelu", (10, 0), 64, 16, 16) == Tile(*SMALL)
    assert look_up("op+fp32+gelu", (8, 0), 64, 16, 16) == Tile(*LARGE)


def test_shipped_files_are_as_the_tuner_writes_them(tmp_path: Path) -> None:
    for table in shipped_tables():
        copy = table._replace(path=tmp_path / table.path.name)
        _tiles.write_table(copy)
        assert copy.path.read_text() == table.path.read_text()


def test_every_source_is_explained_and_used() -> None:
    for table in shipped_tables():
        used = {entry.source for entries in table.ops.values() for entry in entries}
        assert used == set(table.sources), table.path
        for name, what in table.sources.items():
            assert "not measured by" in str(what) or "not by us" in str(what) or what["gpu"], name


def test_exact_sizes_come_before_any_size_and_serve_their_bucket_alone(tmp_path: Path) -> None:
    write(tmp_path / "sm_80.json", {"op": [entry(SMALL), entry(LARGE, 64, n=32, k=48)]})
    _tiles.use_tiles(tmp_path)
    assert [look_up("op", (8, 0), m, 32, 48) == Tile(*LARGE) for m in (32, 33, 64, 65)] == [False, True, True, False]
    assert look_up("op", (8, 0), 64, 48, 32) == Tile(*SMALL)


def test_a_users_table_comes_before_the_shipped_one_of_its_architecture(tmp_path: Path) -> None:
    shipped = look_up("linear_w8a8", (9, 0), 500, 64, 64)
    write(tmp_path / "sm_80.json", {"linear_w8a8": [entry(SMALL)]})
    _tiles.use_tiles(tmp_path)
    assert look_up("linear_w8a8", (8, 0), 500, 64, 64) == Tile(*SMALL)
    assert look_up("linear_w8a8", (9, 0), 500, 64, 64) == shipped
    write(tmp_path / "sm_90.json", {"linear_w8a8": [entry(LARGE, 512, n=64, k=64)]})
    _tiles.use_tiles(tmp_path)
    assert look_up("linear_w8a8", (9, 0), 500, 64, 64) == Tile(*LARGE)
    assert look_up("linear_w8a8", (9, 0), 500, 64, 128) == shipped
    _tiles.use_tiles(None)
    assert look_up("linear_w8a8", (9, 0), 500, 64, 64) == shipped


def test_the_environment_names_a_directory_until_use_tiles_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "generic.json", {"op": [entry(SMALL)]})
    monkeypatch.setenv("DIFFUSERS_DQ_TILES", str(tmp_path))
    with pytest.raises(KeyError, match=r"no tiles for op 'op'; known: \['linear_w4a16'"):
        look_up("op", (8, 0), 1, 16, 16)
    _tiles._CHOSEN.clear()
    _tiles._forget()
    assert look_up("op", (8, 0), 1, 16, 16) == Tile(*SMALL)
    monkeypatch.setenv("DIFFUSERS_DQ_TILES", str(tmp_path / "elsewhere"))
    assert look_up("op", (8, 0), 10_000, 16, 16) == Tile(*SMALL)


def test_what_follows_a_plus_falls_away_where_no_table_has_it() -> None:
    for capability in CAPABILITIES:
        expected = look_up("linear_w8a16+fp32", capability, 64, 16, 16)
        assert look_up("linear_w8a16+fp32+gelu", capability, 64, 16, 16) == expected


def test_pinned_tiles_serve_everything_within() -> None:
    before = look_up("linear_w8a8+gelu", (9, 0), 5, 16, 16)
    with _tiles.pinned("linear_w8a8", Tile(*SMALL)):
        assert (
            look_up("linear_w8a8+gelu", (9, 0), 5, 16, 16) == look_up("linear_w8a8", (8, 0), 5, 16, 16) == Tile(*SMALL)
        )
    assert look_up("linear_w8a8+gelu", (9, 0), 5, 16, 16) == before


GOOD = entry(SMALL)


@pytest.mark.parametrize(
    ("ops", "changes", "message"),
    [
        ({"op": [GOOD]}, {"format_version": 2}, "format_version is 2, but this diffusers_dq_kernels reads 1"),
        ({"op": [{**GOOD, "tile": [16, 16, 32, 1]}]}, {}, "num_stages"),
        ({"op": [{**GOOD, "tile": [16, 24, 32, 1, 2]}]}, {}, "block sizes that are powers of two"),
        ({"op": [{**GOOD, "tile": [16, 8, 32, 1, 2]}]}, {}, "block sizes that are powers of two"),
        ({"op": [{**GOOD, "tile": [16, "16", 32, 1, 2]}]}, {}, "whole numbers"),
        ({"op": [{**GOOD, "tile": [16, 16, 32, 3, 2]}]}, {}, "1 to 16 warps"),
        ({"op": [{**GOOD, "tile": [16, 16, 32, 4, 0]}]}, {}, "1 to 8 stages"),
        ({"op": [{**GOOD, "m": 100}]}, {}, "m one of"),
        ({"op": [{**GOOD, "n": 100}]}, {}, "both n and k"),
        ({"op": [{**GOOD, "source": "there"}]}, {}, r"a source among \['here'\]"),
        ({"op": [{**GOOD, "speed": 3}]}, {}, "speed"),
        ({"op": [{**GOOD, "m": 64}]}, {}, "rise in m up to 8192"),
        ({"op": [GOOD, {**GOOD, "m": 64}]}, {}, "rise in m up to 8192"),
        ({"op": [GOOD, GOOD]}, {}, "two entries"),
        ({"op": [3]}, {}, "not a mapping"),
        ({"op": 3}, {}, "not iterable"),
        ({"op": [GOOD]}, {"sources": {}}, "a source among"),
    ],
)
def test_damaged_tables_are_named(tmp_path: Path, ops: Any, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "sm_90.json", ops, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        _tiles.use_tiles(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1', "3", "\x00"])
def test_files_that_are_no_table_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sm_90.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a usable tile table") as caught:
        _tiles.use_tiles(tmp_path)
    assert str(path) in str(caught.value)


def test_directories_without_tables_and_files_of_other_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tile tables"):
        _tiles.use_tiles(tmp_path)
    write(tmp_path / "h100.json", {"op": [GOOD]})
    with pytest.raises(ValueError, match=r"h100\.json.*its name says no architecture: expected sm_90\.json"):
        _tiles.use_tiles(tmp_path)


def test_a_refused_directory_changes_nothing(tmp_path: Path) -> None:
    before = look_up("linear_w8a8", (9, 0), 500, 64, 64)
    (tmp_path / "sm_90.json").write_text("{")
    with pytest.raises(ValueError, match="sm_90"):
        _tiles.use_tiles(tmp_path)
    assert look_up("linear_w8a8", (9, 0), 500, 64, 64) == before


def test_use_tiles_is_public_and_what_products_look_up_after_it(tmp_path: Path) -> None:
    assert diffusers_dq_kernels.use_tiles is _tiles.use_tiles
    generic = json.loads((_tiles._SHIPPED / "generic.json").read_text())
    tile = [32, 16, 32, 2, 3]
    write(tmp_path / "generic.json", {op: [entry(tile)] for op in generic["ops"]})
    x, weight = torch.ones(3, 32, dtype=torch.int8), torch.ones(16, 32, dtype=torch.int8)
    parameters = (torch.ones(16), torch.ones(3), None, None, None, torch.zeros(1, dtype=torch.int64), torch.float32)
    epilogue = _epilogue.Epilogue(*parameters)
    shipped = _gemm._tile("linear_w8a8", x, weight, epilogue)
    diffusers_dq_kernels.use_tiles(str(tmp_path))
    assert _gemm._tile("linear_w8a8", x, weight, epilogue) == Tile(*tile) != shipped
    diffusers_dq_kernels.use_tiles(None)
    assert _gemm._tile("linear_w8a8", x, weight, epilogue) == shipped


def test_a_refused_directory_leaves_the_one_before(tmp_path: Path) -> None:
    (good := tmp_path / "good").mkdir()
    (bad := tmp_path / "bad").mkdir()
    file = write(good / "sm_90.json", {"linear_w8a8": [entry(SMALL)]})
    write(bad / "sm_90.json", {"linear_w8a8": [entry(LARGE, 64)]})
    _tiles.use_tiles(good)
    for directory, error, message in (
        (tmp_path / "nowhere", FileNotFoundError, f"no directory {tmp_path / 'nowhere'}"),
        (file, NotADirectoryError, f"{file} is a file: expected the directory of tile tables"),
        (tmp_path, FileNotFoundError, f"no tile tables .* in {tmp_path}"),
        (bad, ValueError, f"{bad / 'sm_90.json'}: not a usable tile table"),
    ):
        with pytest.raises(error, match=message):
            _tiles.use_tiles(directory)
        assert look_up("linear_w8a8", (9, 0), 500, 64, 64) == Tile(*SMALL)
    file.write_text("gone bad after it was read")
    _tiles._forget()
    assert look_up("linear_w8a8", (9, 0), 500, 64, 64) == Tile(*SMALL)


def test_a_written_table_reads_back(tmp_path: Path) -> None:
    entries = (Entry(16, Tile(*SMALL), "here"), Entry(8192, Tile(*LARGE), "here"))
    exact = Entry(64, Tile(*SMALL), "here", 32, 48, 60, 1.5, 2.0)
    table = Table(
        tmp_path / "sm_103.json", (10, 3), {"here": {"gpu": "none"}}, {"op": (*entries, exact), "other": entries}
    )
    _tiles.write_table(table)
    assert _tiles.read_table(table.path) == table
    assert [path.name for path in tmp_path.iterdir()] == ["sm_103.json"]


def test_every_op_of_the_tables_has_a_kernel() -> None:
    assert _tiles.known_ops() and {name.partition("+")[0] for name in _tiles.known_ops()} <= _library._FORMS.keys()
