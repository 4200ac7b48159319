# SPDX-License-Identifier: Apache-2.0
"""The results file survives crashes, and is continued only by the run that began it."""

import json
from pathlib import Path

import pytest

from diffusers_dq.benchmark.results import Results

ABOUT = {
    "hardware": "abacus",
    "device": "cpu",
    "threads": 1,
    "versions": {},
    "commit": None,
    "settings": {"rounds": 2},
}


def group(name="a", **more):
    return {"kind": "gemm", "name": name, "settings": {"m": 1}, "rows": [], **more}


def test_the_file_is_whole_after_each_group_and_loads_again(tmp_path):
    results = Results(ABOUT, tmp_path / "new" / "r.json")
    for name in ("a", "b"):
        results.add(group(name))
        assert Results.load(results.path) == results
    results.add(group("a", rows=[{"name": "bf16"}]))
    assert [g["name"] for g in Results.load(results.path).groups] == ["b", "a"], "measured again takes its place"
    assert list(results.path.parent.iterdir()) == [results.path], "nothing temporary stays"


@pytest.mark.parametrize("broken", ["write", "replace", "content"])
def test_a_crash_while_writing_leaves_the_earlier_file(tmp_path, monkeypatch, broken):
    results = Results(ABOUT, tmp_path / "r.json")
    results.add(group("a"))
    before = results.path.read_text()

    def crash(self, *args):
        raise OSError("disk full")

    if broken != "content":
        monkeypatch.setattr(Path, {"write": "write_text", "replace": "replace"}[broken], crash)
    with pytest.raises((OSError, ValueError)):
        results.add(group("b", value=float("nan")))
        raise ValueError("the file took it")
    monkeypatch.undo()
    assert results.path.read_text() == before
    assert list(tmp_path.iterdir()) == [results.path]


def test_a_part_that_failed_as_a_whole_does_not_count_as_measured():
    results = Results(ABOUT)
    results.add(group("a"))
    results.add(group("b", failed="RuntimeError"))
    assert results.holds("gemm", "a", {"m": 1})
    assert not results.holds("gemm", "a", {"m": 2})
    assert not results.holds("gemm", "b", {"m": 1})


def test_resuming_goes_on_with_what_there_is(tmp_path):
    path = tmp_path / "r.json"
    assert Results.resume(path, ABOUT).groups == []
    Results(ABOUT, path).add(group())
    assert len(Results.resume(path, {**ABOUT, "date": "later"}).groups) == 1


@pytest.mark.parametrize("key", ["hardware", "commit", "settings"])
def test_another_run_is_not_resumed(tmp_path, key):
    path = tmp_path / "r.json"
    Results(ABOUT, path).add(group())
    with pytest.raises(ValueError, match=f"its {key} is .* now it is 'other'.*--output"):
        Results.resume(path, {**ABOUT, key: "other"})


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "format_version None"), (json.dumps({"format_version": 9}), "format_version 9")],
)
def test_what_is_no_results_file_is_said_so(tmp_path, content, message):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Results.load(path)
