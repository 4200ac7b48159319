# SPDX-License-Identifier: Apache-2.0
"""Checksums notice every change, and files are replaced whole; what kills and full disks do is in tests/faults."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_dq.files import Checksum, check_seal, read_tensors, replacing, sealed, write_tensors

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


@pytest.mark.parametrize("left", ["file", "folder"])
def test_what_an_earlier_process_left_is_cleared_away(tmp_path, left):
    unfinished = tmp_path / "f.unfinished"
    if left == "file":
        unfinished.write_text("half")
    else:
        unfinished.mkdir()
        (unfinished / ".tmpAbc").write_text("half")
    with replacing(tmp_path / "f") as path:
        path.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "whole"


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
