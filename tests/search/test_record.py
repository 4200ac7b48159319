# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch

from diffusers_dq.search.record import Record, described


def test_a_value_is_computed_once_and_read_back_exactly(tmp_path):
    path = tmp_path / "record.json"
    assert Record(path, {"seed": 1}).value("a", lambda: 0.1 + 0.2) == 0.1 + 0.2
    again = Record(path, {"seed": 1})
    assert again.value("a", lambda: pytest.fail("computed again")) == 0.1 + 0.2
    assert again.value("b", lambda: float("inf")) == float("inf")
    assert Record(path, {"seed": 1}).values == {"a": 0.1 + 0.2, "b": float("inf")}
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_a_record_of_other_settings_is_refused_by_name(tmp_path):
    path = tmp_path / "record.json"
    Record(path, {"seed": 1, "limit": 4}).value("a", lambda: 1)
    with pytest.raises(ValueError, match="its seed is 1, now it is 2"):
        Record(path, {"seed": 2, "limit": 4})


@pytest.mark.parametrize("content", ["{", "[]", '{"values": {}}'])
def test_another_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "notes.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="no checkpoint of a search"):
        Record(path, {})
    assert path.read_text() == content


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"format_version": 99, "settings": {}, "values": {}}))
    with pytest.raises(ValueError, match="format 99"):
        Record(path, {})


def test_a_missing_folder_is_named_before_anything_is_computed(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        Record(tmp_path / "nowhere" / "record.json", {})


def test_arguments_are_described_by_value():
    call = {"prompt_embeds": torch.zeros(2, 3), "labels": [1, 2], "guidance_scale": 1.5, "generator": None}
    same = {**call, "prompt_embeds": torch.zeros(2, 3)}
    assert described(call) == described(same)
    assert described(call) != described({**call, "prompt_embeds": torch.ones(2, 3)})
    json.dumps(described(call | {"callback": print}))
