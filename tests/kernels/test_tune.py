# SPDX-License-Identifier: Apache-2.0
"""The tuner, on a machine whose times are made up."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from diffusers_dq_kernels import _tiles, tune
from diffusers_dq_kernels._tiles import Tile, bucket_of, look_up, read_table
from diffusers_dq_kernels.tune import _command
from diffusers_dq_kernels.tune._machines import DryRun
from diffusers_dq_kernels.tune._problems import Problem, Size, Task, parse_size
from diffusers_dq_kernels.tune._run import tune as run

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


@pytest.fixture(autouse=True)
def shipped_afterwards() -> Iterator[None]:
    yield
    _tiles._CHOSEN.clear()
    _tiles._forget()


class Fake(DryRun):
    """times: of a tile.   objections: of a tile; None where there is nothing to say against it."""

    def __init__(self, times: Callable[[Tile], float], objections: Callable[[Tile], str | None] = lambda tile: None):
        self.times, self.objections, self.timed = times, objections, list[Task]()

    def objection(self, op: str, size: Size, tile: Tile) -> str | None:
        return self.objections(tile)

    def microseconds(self, op: str, size: Size, tiles: Sequence[Tile]) -> dict[Tile, float]:
        self.timed.append(Task(op, size))
        return {tile: self.times(tile) for tile in tiles}


TASK = Task("linear_w8a8", Size(2000, 1152, 1152))
NAME = "linear_w8a8"
SHIPPED = Tile(128, 256, 128, 8, 4)


def test_a_dry_run_writes_a_table_that_the_look_up_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--op", "linear_w8a8", "--op", "linear_w8a16", "--models", "dit-xl-2-256"]
    assert tune.main([*arguments, "--shapes", "64x128x96", "--output", str(tmp_path), "--dry-run"]) == 0
    table = read_table(tmp_path / "sm_90.json")
    assert set(table.ops) == {NAME, f"{NAME}+gelu", f"{NAME}+residual", "linear_w8a16", "linear_w8a16+residual"}
    assert "[1/7]" in capsys.readouterr().out
    _tiles.use_tiles(tmp_path)
    for name, entries in table.ops.items():
        for entry in entries:
            assert entry.n is not None and entry.k is not None and entry.rows is not None
            assert look_up(name, (9, 0), entry.rows, entry.n, entry.k) == entry.tile
    assert any(entry.shipped_microseconds != entry.microseconds for entries in table.ops.values() for entry in entries)


def test_the_fastest_is_kept_with_where_it_was_measured(tmp_path: Path) -> None:
    best = Tile(128, 128, 128, 8, 4)
    table = run(Fake(lambda tile: 5.0 if tile == best else 8.0), [TASK], tmp_path, say=lambda text: None)
    (entry,) = table.ops[NAME]
    assert entry[1:2] == (best,) and entry.key == (2048, 1152, 1152) and entry.rows == 2000
    assert (entry.microseconds, entry.shipped_microseconds) == (5.0, 8.0)
    assert table.sources[entry.source].keys() == {"gpu", "torch", "triton", "date", "commit"}
    assert read_table(tmp_path / "sm_90.json") == table


def test_a_little_faster_is_not_worth_a_compilation(tmp_path: Path) -> None:
    table = run(Fake(lambda tile: 10.0 if tile == SHIPPED else 9.9), [TASK], tmp_path, say=lambda text: None)
    assert table.ops[NAME][0].tile == SHIPPED


def test_unusable_tiles_are_left_out_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    machine = Fake(lambda tile: -tile.block_m * tile.block_n, lambda tile: "spills" if tile.block_n == 256 else None)
    table = run(machine, [TASK], tmp_path, say=said.append)
    assert table.ops[NAME][0].tile.block_n < 256 and table.ops[NAME][0].shipped_microseconds is None
    assert any("(128, 256, 128, 8, 4) left out: spills" in line for line in said) and "shipped unusable" in said[-1]


def test_nothing_is_written_where_no_tile_can_be_used(tmp_path: Path) -> None:
    table = run(Fake(lambda tile: 1.0, lambda tile: "no"), [TASK], tmp_path, say=lambda text: None)
    assert table.ops == {} and not any(tmp_path.iterdir())


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    other = Task("linear_w4a8", Size(64, 1152, 1152))
    first, second = Fake(lambda tile: 1.0), Fake(lambda tile: 2.0)
    run(first, [TASK], tmp_path, say=lambda text: None)
    said: list[str] = []
    table = run(second, [TASK, other], tmp_path, say=said.append)
    assert second.timed == [other] and "known from M = 2000, 1.0 us" in said[0]
    assert len(table.ops) == 2 and len(table.sources) == 2


def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Problem, "expected", lambda self, arguments: torch.zeros(1))
    said: list[str] = []
    run(DryRun(), [TASK], tmp_path, say=said.append)
    assert all("its result is wrong" in line for line in said[:-1]) and "no usable tile" in said[-1]


def test_results_are_checked_against_exact_ones() -> None:
    for op in tune.PROBLEMS:
        for tile in (Tile(16, 32, 32, 4, 2), Tile(64, 64, 64, 4, 2)):
            assert DryRun().objection(op, Size(40, 48, 64), tile) is None


@pytest.mark.parametrize("op", list(tune.PROBLEMS))
@pytest.mark.parametrize("finish", ["", "gelu", "residual"])
def test_what_is_timed_looks_up_the_table_that_is_written(op: str, finish: str) -> None:
    problem, size = tune.PROBLEMS[op], Size(40, 48, 128, finish)
    y = getattr(torch.ops.diffusers_dq, op)(*problem.arguments(size, "cpu"))
    assert y.shape == (40, 48) and problem.table_of(op, size) == _tiles.table_name(op, finish=finish)
    assert problem.table_of(op, size._replace(k=96)) == f"{op}+residual"  # a tail in K


def test_candidates_and_shipped_tiles_are_the_same_kind_of_thing() -> None:
    for capability in CAPABILITIES:
        for op in tune.PROBLEMS:
            for finish in ("", "gelu", "residual"):
                tiles = tune.candidates(_tiles.table_name(op, finish=finish), capability)
                assert 3 <= len(tiles) == len(set(tiles)) <= 16


def test_models_have_the_sizes_of_their_linears() -> None:
    for tokens, modulation in tune.MODELS.values():
        assert tokens and modulation
        for size in (*tokens, *modulation):
            assert size == parse_size(str(size))


def test_without_a_gpu_the_error_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--shapes", "64x64x64", "--output", str(tmp_path)]) == 1
    assert "error: no CUDA GPU: tiles can be timed only on the GPU they are for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "got neither --shapes nor --models"),
        (["--models", "dit"], "expected some of dit-xl-2-256, .*; got dit"),
        (["--shapes", "64x64"], "expected MxNxK, got '64x64'"),
        (["--shapes", "64x64x64:relu"], "expected :gelu or :residual"),
        (["--shapes", "64x60x64"], "N a multiple of 16"),
        (["--shapes", "64x64x0"], "K of 32"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([*arguments, "--output", str(tmp_path), "--dry-run"]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_an_output_that_cannot_be_written_is_found_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_command, "tune", lambda *arguments: pytest.fail("it times"))
    (tmp_path / "file").write_text("something")
    (tmp_path / "tables" / "sm_90.json").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for output, message in (
        ("file", "is not a directory; give the directory of the tables"),
        ("file/tables", "cannot be written to (Not a directory); give a directory that you may write to"),
        (f"new/{300 * 'x'}", "cannot be written to (File name too long); give a directory that you may write to"),
        ("tables", "sm_90.json in it is not a file that you may read and write; give another directory"),
    ):
        assert tune.main(["--shapes", "64x64x64", "--output", str(tmp_path / output), "--dry-run"]) == 2
        assert capsys.readouterr().err == f"error: --output {tmp_path / output}: {message}\n"
        assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "something"


def test_the_look_at_the_output_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "sm_90.json").write_text("something")
    for output in (tmp_path, tmp_path / "new" / "deep"):
        assert _command._objection_to(output, "sm_90.json") is None
        assert list(tmp_path.rglob("*")) == [tmp_path / "sm_90.json"]
    assert (tmp_path / "sm_90.json").read_text() == "something"


def test_a_damaged_table_in_the_output_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sm_90.json").write_text(json.dumps({"format_version": 7}))
    assert tune.main(["--shapes", "64x64x64", "--output", str(tmp_path), "--dry-run"]) == 1
    assert "sm_90.json: not a usable tile table: format_version is 7" in capsys.readouterr().err
    assert json.loads((tmp_path / "sm_90.json").read_text()) == {"format_version": 7}


def test_sizes_in_one_bucket_are_one_task() -> None:
    tasks = _command._tasks(["linear_w8a8"], ["1100x64x128", "2048x64x128", "2049x64x128"], [])
    assert [task.size.m for task in tasks] == [1100, 2049] and bucket_of(1100) == 2048


@needs_gpu
@pytest.mark.gpu
def test_tuning_on_the_gpu(tmp_path: Path) -> None:
    assert tune.main(["--shapes", "512x1152x1152", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert set(read_table(path).ops) == set(tune.PROBLEMS)
