# SPDX-License-Identifier: Apache-2.0
"""Checksums notice every change, and files are replaced whole; what kills and full disks do is in tests/faults."""

import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_dq.files import (
    Checksum,
    check_seal,
    read_json,
    read_tensors,
    replacing,
    sealed,
    write_json,
    write_tensors,
    write_whole,
)

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor(1.5, dtype=torch.bfloat16),
    "c": torch.empty(0, 4),
    "d": torch.arange(12).view(3, 4).T,
    "e": torch.tensor([True, False]),
}


def test_the_order_of_tensors_does_not_matter_and_anything_else_does():
    plain = Checksum.of(TENSORS).with_text("x")
    assert Checksum.of(dict(reversed(TENSORS.items()))).with_text("x") == plain
    assert Checksum.of({**TENSORS, "d": TENSORS["d"].contiguous()}).with_text("x") == plain
    changed = [
        {**TENSORS, "a": TENSORS["a"].view(3, 2)},
        {**TENSORS, "a": TENSORS["a"].view(torch.int32)},
        {**TENSORS, "a": TENSORS["a"].flip(0)},
        {**TENSORS, "b": torch.tensor(1.5078125, dtype=torch.bfloat16)},
        {**TENSORS, "c": torch.empty(4, 0)},
        {key: value for key, value in TENSORS.items() if key != "c"},
        {("f" if key == "e" else key): value for key, value in TENSORS.items()},
    ]
    others = [Checksum.of(tensors).with_text("x") for tensors in changed] + [Checksum.of(TENSORS).with_text("y")]
    assert len({plain, *others}) == 1 + len(others)


def test_what_is_written_is_read(tmp_path):
    write_tensors(tmp_path / "f", TENSORS, {"z": 1, "a": [None]})
    header, tensors = read_tensors(tmp_path / "f")
    assert header == {"z": 1, "a": [None]} and list(header) == ["z", "a"]
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_tensors_that_share_memory_are_written_each(tmp_path):
    whole = torch.arange(6.0)
    tensors = {"a": whole, "b": whole, "c": whole[2:], "d": whole.view(2, 3).T}
    write_tensors(tmp_path / "f", tensors, {})
    found = read_tensors(tmp_path / "f")[1]
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_same_content_is_the_same_file(tmp_path):
    contents = set()
    for i in range(8):
        write_tensors(tmp_path / str(i), TENSORS, {"z": 1, "a": [None]})
        contents.add((tmp_path / str(i)).read_bytes())
    assert len(contents) == 1


def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a device or a pipe"):
        write_json(tmp_path / "pipe", {})
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and not (tmp_path / "pipe").is_file()


def test_one_bit_of_a_value_is_noticed_unless_there_is_no_checksum(tmp_path):
    path = tmp_path / "f"
    write_tensors(path, TENSORS, {})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged: its contents are not what was written"):
        read_tensors(path)
    save_file(load_file(path), path, metadata={"diffusers_dq": "{}"})
    assert read_tensors(path)[0] == {}


KILLED = """
import os, signal, sys
from pathlib import Path
from diffusers_dq.files import replacing
with replacing(Path(sys.argv[1])) as path:
    path.with_name(".tmpAbc").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    ended = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "f"], check=False)
    assert ended.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    with replacing(tmp_path / "other") as path:
        path.write_text("whole")
    assert len(list(tmp_path.iterdir())) == 2, "of another file"
    with replacing(tmp_path / "f") as path:
        path.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"f", "other"} and (tmp_path / "f").read_text() == "whole"


def test_a_folder_of_somebody_else_stays(tmp_path):
    for name in ("f.unfinished", ".f.mine.unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("mine")
    with replacing(tmp_path / "f") as path:
        path.write_text("whole")
    assert all((tmp_path / name / "thesis").exists() for name in ("f.unfinished", ".f.mine.unfinished"))


def test_of_two_writers_at_once_each_writes_the_whole(tmp_path):
    with replacing(tmp_path / "f") as first:
        first.write_text("first")
        with replacing(tmp_path / "f") as second:
            second.write_text("sec")
            assert first != second and first.exists()
        assert (tmp_path / "f").read_text() == "sec"
    assert (tmp_path / "f").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["f"]


def test_many_threads_may_write_one_file(tmp_path):
    def write(text):
        write_whole(tmp_path / "f", lambda file: file.write(text.encode() * 1000))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, [f"{i:03d}" for i in range(200)]))
    text = (tmp_path / "f").read_text()
    assert text == text[:3] * 1000 and [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "file").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    write_whole(tmp_path / "link", lambda file: file.write(b"after"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").read_text() == "after"


def test_a_file_keeps_its_mode(tmp_path):
    (tmp_path / "f").touch()
    (tmp_path / "f").chmod(0o640)
    write_json(tmp_path / "f", {})
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640


def test_a_file_system_without_locks_can_be_written_to(tmp_path, monkeypatch):
    def unknown(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("diffusers_dq.files.fcntl.flock", unknown)
    with replacing(tmp_path / "f") as first:
        first.write_text("first")
        write_json(tmp_path / "f", {})
        assert first.exists(), "not taken for that of a killed process"
    assert (tmp_path / "f").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["f"]


def test_strict_json_holds_what_is_not_finite(tmp_path):
    content = {"a": [math.inf, -math.inf, math.nan, 1.5, None], 2: tmp_path}
    write_json(tmp_path / "new" / "f.json", content)
    assert read_json(tmp_path / "new" / "f.json") == {"a": ["inf", "-inf", "nan", 1.5, None], "2": str(tmp_path)}


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 10_000, b'{"a": 1}}'])
def test_what_is_no_json_is_said_so(tmp_path, text):
    (tmp_path / "f").write_bytes(text)
    with pytest.raises(ValueError, match=f"^{tmp_path}/f is not JSON"):
        read_json(tmp_path / "f")


def test_an_exception_while_writing_leaves_what_was_there(tmp_path):
    (tmp_path / "f").write_text("before")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "f") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "before"


def test_a_seal_holds_tensors_and_result_together():
    result = sealed({"linears": {"a": (1, 2)}, "n": 1}, TENSORS)
    check_seal(result, Checksum.of(TENSORS))
    check_seal(sealed(result, TENSORS), Checksum.of(TENSORS))  # sealed again
    check_seal({"linears": {"a": [1, 2]}, "n": 1, "checksum": result["checksum"]}, Checksum.of(TENSORS))  # JSON's
    check_seal({"n": 5}, Checksum())  # an earlier version's
    for other, tensors in (({**result, "n": 2}, TENSORS), (result, {**TENSORS, "c": torch.empty(1)})):
        with pytest.raises(ValueError, match="were not saved together"):
            check_seal(other, Checksum.of(tensors))
