# SPDX-License-Identifier: Apache-2.0
"""`diffusers-dq evaluate`, from end to end on a tiny model."""

import json
import math
import sys

import numpy as np
import pytest
from diffusers import DiTPipeline
from typer.testing import CliRunner

import diffusers_dq as dq
from diffusers_dq.cli import app
from diffusers_dq.evaluation import PictureSet
from diffusers_dq.evaluation.figures import NAMES

runner = CliRunner()
SIZES = ("--images", 5, "--steps", 2, "--batch", 2, "--classes", 20, "--guidance", 1.5, "--device", "cpu")
NETWORK = """
import torch
from torch import nn

class Means(nn.Module):
    def forward(self, x):
        return {"pooled": (x / 255).mean((2, 3)), "logits": (x / 255).amax((2, 3))}
"""


def run(*arguments, exit_code=0):
    result = runner.invoke(app, ["evaluate", *(str(argument) for argument in arguments)])
    assert result.exit_code == exit_code, result.output + str(result.exception)
    return result.output


@pytest.fixture(scope="module")
def quantized(dit_folder, tmp_path_factory):
    """Folder of the same model, W4A8."""
    pipe = DiTPipeline.from_pretrained(dit_folder)
    dq.quantize(pipe, dq.DQConfig("rtn", weight_bits=4), progress=False)
    folder = tmp_path_factory.mktemp("quantized")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(dit_folder, quantized, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "network.py").write_text(NETWORK)
    real = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "real.npz", real)
    arguments = ["--reference", folder / "real.npz", "--features", f"{folder / 'network.py'}:Means"]
    return folder, [quantized, *SIZES, *arguments, "--output", folder / "out"]


def test_a_model_is_measured_and_a_second_run_samples_nothing(evaluated, monkeypatch):
    folder, arguments = evaluated
    text = run(*arguments)
    content = json.loads((folder / "out" / "metrics.json").read_text())
    assert set(content["figures"]) == {"FID", "IS", "precision", "recall", "KID"}
    assert content["not_available"]["sFID"] == "the feature extractor gives no spatial"
    assert set(content["figures"]) | set(content["not_available"]) == set(NAMES)
    assert content["n"] == 5 and content["seeds"] == [0, 4] and content["reference"]["n"] == 6
    assert content["sampling"]["steps"] == 2 and content["sampling"]["guidance"] == 1.5
    assert content["versions"]["diffusers"] and content["date"]
    assert f"FID        {content['figures']['FID']:.2f}" in text and "LPIPS      not available: no pairs" in text

    monkeypatch.setattr("diffusers_dq.evaluation.sampling._pictures", lambda *args: pytest.fail("it samples again"))
    run(*arguments)
    again = json.loads((folder / "out" / "metrics.json").read_text())
    assert again["figures"] == content["figures"]
    text = run(*[3 if argument == 2 else argument for argument in arguments], exit_code=1)
    assert "pictures of other settings: batch 2, now 3; steps 2, now 3" in text


def test_a_model_is_paired_with_another(evaluated, quantized, dit_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_dq.evaluation.paired.ssim", lambda x, y: np.ones(len(x)))  # pictures of 8 x 8
    pair = ("--paired-with", dit_folder, "--pairs", 2, "--output", tmp_path)
    text = run(quantized, *SIZES, *pair)
    content = json.loads((tmp_path / "metrics.json").read_text())
    a, b = (PictureSet.open(tmp_path / name).first(5) / 255 for name in ("pictures", "paired_with"))
    expected = -10 * np.log10(((a - b) ** 2).mean((1, 2, 3))).mean()
    assert content["figures"]["PSNR"] == pytest.approx(expected, rel=1e-5)  # there divided by 255 in fp32
    assert content["not_available"]["SSIM"] == "its window is of 11 x 11 pixels, the pictures are of 8 x 8"
    assert content["not_available"]["FID"] == "no feature extractor: give --features"
    assert len(content["pairs"]["latent_snr_db"]) == 2 and float(content["pairs"]["latent_snr_db"][0]) == math.inf
    assert "latent SNR at the last step, 2 pictures" in text
    assert (tmp_path / "pairs" / "comparison.json").exists()

    run(quantized, *SIZES, "--paired-with", tmp_path / "paired_with", "--output", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["figures"] == content["figures"]
    run(dit_folder, *SIZES, "--paired-with", tmp_path, "--output", tmp_path / "turned")
    turned = json.loads((tmp_path / "turned" / "metrics.json").read_text())
    assert turned["figures"]["PSNR"] == pytest.approx(expected, rel=1e-5), (
        "the output of a run stands for its pictures"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", 0], "--classes must be 1 to 1000, got 0"),
        (["--reference", "{tmp}/none"], "holds no pictures: give a folder"),
        (["--reference", "{tmp}/one.npz"], "holds 1 picture; a distribution needs 2 at least"),
        (["--reference", "{tmp}/large.npz"], "of 8 x 8 pixels, those of the reference of 9 x 9"),
        (["--features", "nothing"], "--features 'nothing': expected path/to/file.py:function"),
        (["--prompts", "{tmp}/none.txt"], "none.txt is no file; --prompts takes a text file"),
        (["--prompts", "{tmp}/empty.txt"], "empty.txt holds no prompt"),
        (["--pairs", 2], "--pairs runs two models side by side; give --paired-with a model"),
        (["--paired-with", "{tmp}"], "holds no model_index.json"),
        (["--clip", "{tmp}"], "no CLIP model could be loaded"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(dit_folder, tmp_path, arguments, message):
    np.savez(tmp_path / "one.npz", np.zeros((1, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "large.npz", np.zeros((4, 9, 9, 3), np.uint8))
    (tmp_path / "network.py").write_text(NETWORK)
    (tmp_path / "empty.txt").write_text("\n\n")
    arguments = [str(argument).format(tmp=tmp_path) for argument in arguments]
    if "--reference" in arguments:
        arguments += ["--features", f"{tmp_path / 'network.py'}:Means"]
    text = run(dit_folder, *SIZES, "--output", tmp_path / "out", *arguments, exit_code=1)
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert message in error
    assert "Traceback" not in text and not list((tmp_path / "out").rglob("pictures-*"))


def test_a_reference_without_a_network_is_an_error_before_anything_is_sampled(evaluated, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    folder, (model, *_) = evaluated
    text = run(model, *SIZES, "--reference", folder / "real.npz", "--output", tmp_path, exit_code=1)
    assert "error: the Inception network is not to be had here" in text and "or give --features" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["/no/such/folder", "no_such_folder", "{tmp}"])
def test_a_model_that_is_not_there_is_one_line(tmp_path, model):
    text = run(model.format(tmp=tmp_path), *SIZES, "--output", tmp_path / "out", exit_code=1)
    assert "error: there is no folder" in text or "holds no model_index.json" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", 0], "'--images': Input should be greater than or equal to 1"),
        (["--dtype", "int8"], "expected one of float32, bfloat16, float16, got 'int8'"),
        (["--device", "cuda"], "sees no GPU here; give --device cpu"),
        (["--device", "abacus"], "--device must be a device of torch"),
        (["--argument", "height"], "--argument must be KEY=VALUE, as height=512; got 'height'"),
    ],
)
def test_an_option_that_cannot_be_is_a_usage_error(dit_folder, tmp_path, arguments, message):
    text = run(dit_folder, *SIZES, "--output", tmp_path / "out", *arguments, exit_code=2)
    assert message.replace(" ", "") in "".join(text.replace("│", "").split()) and not (tmp_path / "out").exists()


def test_without_labels_of_the_pipeline_all_classes_are_taken_in_turn(dit_folder, tmp_path):
    sizes = [argument for argument in SIZES if argument not in ("--classes", 20)]
    run(dit_folder, *sizes, "--output", tmp_path)
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["sampling"]["classes"] == list(range(1000))
