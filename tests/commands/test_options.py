# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import typer
from support import tiny_pipeline

import diffusers_dq as dq
from diffusers_dq.commands.console import device_of
from diffusers_dq.commands.options import Conditions, config_of, key_values
from diffusers_dq.files import strict


class Prompted:
    """What calls_of asks of a text-to-image pipeline: its signature."""

    def __call__(self, prompt=None, height=None, guidance_scale=4.0):
        pass


def test_class_labels_are_numbers_and_ranges_in_batches():
    calls = Conditions(class_labels="7, 0-2,9", batch=2, guidance=1.5, argument=["eta=0.5"]).calls_of(tiny_pipeline())
    further = {"guidance_scale": 1.5, "eta": 0.5}
    assert calls == [{"class_labels": labels} | further for labels in ([7, 0], [1, 2], [9])]


def test_with_nothing_said_labels_are_spread_over_the_classes():
    calls = Conditions().calls_of(tiny_pipeline())
    labels = [label for call in calls for label in call["class_labels"]]
    assert labels == [i * 1000 // 16 for i in range(16)]


def test_prompts_from_the_line_and_from_a_file(tmp_path):
    expected = [{"prompt": ["a fox", "a hen"], "height": 64}]
    assert Conditions(prompt=["a fox", "a hen"], argument=["height=64"]).calls_of(Prompted()) == expected
    (tmp_path / "p.txt").write_text("a fox\n\na hen\n")
    assert Conditions(prompts=tmp_path / "p.txt", argument=["height=64"]).calls_of(Prompted()) == expected


def test_calls_are_taken_as_they_are(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps([{"prompt": "a", "guidance_scale": 9}, {"prompt": "b"}]))
    calls = Conditions(calls=tmp_path / "c.json", guidance=2.0).calls_of(Prompted())
    assert calls == [{"guidance_scale": 9, "prompt": "a"}, {"guidance_scale": 2.0, "prompt": "b"}]


@pytest.mark.parametrize(
    ("given", "pipe", "message"),
    [
        ({}, Prompted(), "say what Prompted is to make: --prompt"),
        ({"class_labels": "1"}, Prompted(), "takes no class labels"),
        ({"prompt": ["a"]}, None, "takes --class-labels, not prompts"),
    ],
)
def test_what_does_not_suit_the_pipeline(given, pipe, message):
    with pytest.raises(typer.BadParameter, match=message):
        Conditions(**given).calls_of(pipe or tiny_pipeline())


@pytest.mark.parametrize("content", ["{}", "[]", "[1]", "nothing"])
def test_a_calls_file_must_hold_objects(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(typer.BadParameter, match="--calls .*(a list of objects|no JSON file)"):
        Conditions(calls=tmp_path / "c.json")


def test_options_become_a_config():
    found = config_of("htg", None, 4, None, ["groups=3", "rounding=gptq", "guard_steps=[1, 2]", "online=True"], None)
    expected = dq.DQConfig("htg", 4, 8, groups=3, rounding="gptq", guard_steps=[1, 2], online=True)
    assert found == expected
    assert config_of(None, "quality", None, 6, None, None) == dq.DQConfig(preset="quality", activation_bits=6)


def test_values_are_json_or_strings():
    found = key_values("--option", ["a=1", "b=x", "c=null", "d=False", "e=a=b", 'f={"g": 1}'])
    assert found == {"a": 1, "b": "x", "c": None, "d": False, "e": "a=b", "f": {"g": 1}}
    for wrong in ("a", "=1", "a b=1"):
        with pytest.raises(typer.BadParameter, match="must be KEY=VALUE"):
            key_values("--option", [wrong])


def test_json_is_strict():
    assert strict({1: (float("nan"), float("-inf")), "a": [1.5]}) == {"1": ["nan", "-inf"], "a": [1.5]}


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device_of("") == "cpu"
    with pytest.raises(typer.BadParameter, match="sees no GPU here; give --device cpu"):
        device_of("cuda:0")
