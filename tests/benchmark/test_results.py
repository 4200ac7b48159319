# SPDX-License-Identifier: Apache-2.0
"""The results file survives crashes, and is continued only by the run that began it."""

import copy
import json
import os
from pathlib import Path

import pytest

from diffusers_dq.benchmark.results import Results, check_place

ABOUT = {
    "hardware": "abacus",
    "device": "cpu",
    "threads": 1,
    "versions": {},
    "driver": None,
    "date": "2026-01-02",
    "commit": None,
    "dirty": None,
    "settings": {"rounds": 2, "scope": "model", "cuda_graphs": False},
}
SHAPE = {"model": "DiT", "m": 1, "n": 1, "k": 1}
SIZES = dict(layers=1, heads=1, head_dim=1, frames=1, tokens=1, batch=1, cfg=False)
TIMES = {"median_ms": 1.0, "quartile_low_ms": 1.0, "quartile_high_ms": 1.0}
PROFILE = {"ms": 1.0, "entries": [{"name": "aten::mm", "calls": 1.0, "ms": 1.0}]}


def group(name="a", **more):
    return {"kind": "gemm", "name": name, "settings": SHAPE, "rows": [], **more}


def a_step():
    row = {"name": "bf16", "mode": "eager", "kind": "baseline", **TIMES, "profile": PROFILE}
    return {"kind": "step", "name": "dit", "settings": SIZES, "rows": [row]}


def test_the_file_is_whole_after_each_group_and_loads_again(tmp_path):
    results = Results(ABOUT, tmp_path / "new" / "r.json")
    for name in ("a", "b"):
        results.add(group(name))
        assert Results.load(results.path) == results
    results.add(group("a", rows=[{"name": "bf16", **TIMES}]))
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
    assert results.holds("gemm", "a", SHAPE)
    assert not results.holds("gemm", "a", {**SHAPE, "m": 2})
    assert not results.holds("gemm", "b", SHAPE)


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
    [
        ("{", "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[]", "format_version None"),
        (json.dumps({"format_version": 9}), "format_version 9"),
        (json.dumps({"format_version": 1}), "the file has no 'about'"),
    ],
)
def test_what_is_no_results_file_is_said_so(tmp_path, content, message):
    path = tmp_path / "r.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as raised:
        Results.load(path)
    assert str(raised.value).startswith(f"{path} ")


def test_every_truncation_of_a_file_is_said_so(tmp_path):
    path = tmp_path / "r.json"
    results = Results(ABOUT, path)
    results.add(a_step())
    text = path.read_text().rstrip()
    for length in range(len(text)):
        path.write_text(text[:length])
        with pytest.raises(ValueError, match=f"^{path} is not JSON"):
            Results.load(path)


def leaves(value, where=()):
    """The path of everything in a JSON value."""
    yield where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*where, key))


def changed(content, where, change):
    content = copy.deepcopy(content)
    holder = content
    for key in where[:-1]:
        holder = holder[key]
    change(holder, where[-1])
    return content


def test_a_file_edited_by_hand_is_said_so_or_can_be_shown(tmp_path):
    """Each part of a file removed, or put in by another type: load refuses it, or the report takes it."""
    from diffusers_dq.benchmark.report import load_all, section

    path = tmp_path / "r.json"
    results = Results(ABOUT, path)
    peak = {"int8_tops": 1.0, "definition": "so", "kind": "peak", "rows": [{"name": "bf16", **TIMES, "tops": 1.0}]}
    for one in (a_step(), group(), {**group("square"), **peak}):
        results.add(one)
    content, refused = json.loads(path.read_text()), 0
    for where in list(leaves(content))[1:]:
        for change in (
            lambda holder, key: holder.pop(key),
            lambda holder, key: holder.__setitem__(key, None),
            lambda holder, key: holder.__setitem__(key, "other"),
            lambda holder, key: holder.__setitem__(key, ["other"]),
        ):
            path.write_text(json.dumps(changed(content, where, change)))
            found, left_out = load_all(tmp_path)
            assert len(found) + len(left_out) == 1
            section(found, left_out)
            refused += len(left_out)
    assert refused > 100


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("about",), [], "the file.about is a list, expected an object"),
        (("about", "threads"), "two", "about.threads is a text, expected a number"),
        (("groups", 0, "kind"), "race", "groups[0].kind is 'race', expected one of gemm, peak, step, pipeline"),
        (
            ("groups", 0, "rows", 0, "kind"),
            "friend",
            "groups[0].rows[0].kind is 'friend', expected one of baseline, ours, peer",
        ),
        (("groups", 0), 7, "groups[0] is a number, expected an object"),
        (("groups", 0, "rows", 0, "median_ms"), None, "groups[0].rows[0].median_ms is null, expected a number"),
        (("groups", 0, "rows", 0, "profile", "ms"), "1", "groups[0].rows[0].profile.ms is a text, expected a number"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, where, value, message):
    path = tmp_path / "r.json"
    Results(ABOUT, path).add(a_step())
    content = changed(json.loads(path.read_text()), where, lambda holder, key: holder.__setitem__(key, value))
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as raised:
        Results.load(path)
    assert str(raised.value) == f"{path} is not a results file: {message}; measure again without --resume"


def test_a_file_that_cannot_be_read_is_said_so(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be read"):
        Results.load(tmp_path)


def everything_below(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_place_that_can_be_written_is_left_as_it_is(tmp_path):
    there = tmp_path / "there.json"
    there.write_text("something")
    before = everything_below(tmp_path)
    for path in (there, tmp_path / "new.json", tmp_path / "new" / "deep" / "r.json"):
        check_place(path)
        assert everything_below(tmp_path) == before


def test_a_place_that_cannot_be_written_is_said_so_and_left_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("something")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = set(tmp_path.rglob("*"))
    for name, message in (
        ("folder", "is a directory; give --output the name of a file"),
        ("pipe", "is not a file that you may write to; give --output another name"),
        ("file/r.json", "cannot be written .*; give --output a file in a directory"),
        ("new/" + 300 * "x" + ".json", "cannot be written .*; give --output a file in a directory"),
    ):
        with pytest.raises(ValueError, match=f"^{tmp_path / name} {message}"):
            check_place(tmp_path / name)
        assert set(tmp_path.rglob("*")) == before
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as root everything is writable
    with pytest.raises(ValueError, match="is not a file that you may write to"):
        check_place(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "something"
