# SPDX-License-Identifier: Apache-2.0
"""Commands that are interrupted, given what cannot be used, or meet a model that has diverged."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image
from support import tiny_pipeline
from typer.testing import CliRunner

import diffusers_dq as dq
from diffusers_dq.cli import app

runner = CliRunner()
LABELS = ("--class-labels", "3,5", "--device", "cpu")


def invoke(*arguments, exit_code=0):
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output + repr(result.exception)
    return result


@pytest.fixture
def small_pictures(monkeypatch):
    """SSIM's window is larger than pictures of 8 x 8."""
    monkeypatch.setattr("diffusers_dq.evaluation.paired.ssim", lambda x, y: np.ones(len(x)))


@pytest.fixture(scope="module")
def rtn(dit_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rtn") / "rtn"
    invoke("quantize", dit_folder, "--output", folder, "--method", "rtn", "--device", "cpu")
    return folder


@pytest.fixture
def diverging(monkeypatch):
    """Makes some pictures of each call hold values that are no numbers."""
    whole = DiTPipeline.__call__

    def make(which):
        def call(pipe, *args, **kwargs):
            (images,) = whole(pipe, *args, **kwargs)
            images[which, 0, 0] = np.nan
            return (images,)

        call.__signature__ = inspect.signature(whole)
        monkeypatch.setattr(DiTPipeline, "__call__", call)

    return make


def test_ctrl_c_while_saving_leaves_no_folder_and_the_same_command_goes_on(dit_folder, tmp_path, monkeypatch):
    command = ("quantize", dit_folder, "--output", tmp_path / "q", "--method", "htg", "--steps", 3, *LABELS)
    with monkeypatch.context() as patch:

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        patch.setattr("diffusers.AutoencoderKL.save_pretrained", interrupted)
        said = invoke(*command, exit_code=130).stderr
    assert f"the same command goes on from {tmp_path / 'q'}.statistics.safetensors" in said
    assert [path.name for path in tmp_path.iterdir()] == ["q.statistics.safetensors"]
    monkeypatch.setattr("diffusers_dq.calibration.run_call", lambda *args, **kwargs: pytest.fail("calibrated again"))
    invoke(*command)
    assert DiTPipeline.from_pretrained(tmp_path / "q").transformer.is_quantized


def test_ctrl_c_while_learning_goes_on_from_what_was_learned(dit_folder, tmp_path, monkeypatch):
    learned = ("--option", "rounding=adaround", "--option", 'reconstruction={"iterations": 2, "unit": "block"}')
    bits = ("--method", "ptq4dit", "--weight-bits", 4)
    command = ("quantize", dit_folder, "--output", tmp_path / "q", *bits, "--steps", 3, *LABELS, *learned)
    given = []

    def quantize(pipe, config, *, checkpoint, **settings):
        given.append(checkpoint)
        checkpoint.write_text("learned")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("diffusers_dq.commands.quantize.dq.quantize", quantize)
        said = invoke(*command, exit_code=130).stderr
    assert given == [tmp_path / "q.reconstruction"] and str(given[0]) in said
    given[0].unlink()
    invoke(*command)
    assert {path.name for path in tmp_path.iterdir()} == {"q", "q.statistics.safetensors"}


def test_statistics_of_other_options_are_made_anew_only_with_overwrite(dit_folder, tmp_path):
    command = ("quantize", dit_folder, "--output", tmp_path / "q", "--method", "htg", *LABELS)
    invoke(*command, "--steps", 3)
    own = tmp_path / "q.statistics.safetensors"
    assert f"{own} is not empty" not in (said := invoke(*command, "--steps", 4, exit_code=1).stderr)
    assert "is not empty: --overwrite" in said
    (tmp_path / "q").rename(tmp_path / "elsewhere")
    assert f"or delete {own}" in invoke(*command, "--steps", 4, exit_code=1).stderr
    assert "starting anew" in invoke(*command, "--steps", 4, "--overwrite").stderr
    assert len(dq.Statistics.load(own).timesteps) == 4


def test_what_the_options_say_reaches_the_calibration(dit_folder, tmp_path):
    given = ("--steps", 3, "--seed", 7, "--second-moments", "--samples", 1, *LABELS)
    invoke("calibrate", dit_folder, "--output", tmp_path / "s", *given)
    found = dq.Statistics.load(tmp_path / "s")
    assert found.about["seed"] == 7 and len(found.samples) <= 1
    assert any(site.products is not None for site in found.sites.values())
    invoke("quantize", dit_folder, "--output", tmp_path / "q", "--method", "htg", "--steps", 3, "--seed", 9, *LABELS)
    assert dq.Statistics.load(tmp_path / "q.statistics.safetensors").about["seed"] == 9


def test_a_file_that_is_not_of_learning_stays(dit_folder, tmp_path):
    (tmp_path / "q.reconstruction").write_text("mine")
    invoke("quantize", dit_folder, "--output", tmp_path / "q", "--method", "rtn", "--device", "cpu")
    assert (tmp_path / "q.reconstruction").read_text() == "mine"


def test_nothing_to_quantize_is_said(dit_folder, tmp_path):
    given = ("--method", "rtn", "--weight-bits", 16, "--activation-bits", 16, "--device", "cpu")
    assert "nothing was rounded" in invoke("quantize", dit_folder, "--output", tmp_path / "q", *given).stderr


def test_generate_says_which_pictures_are_no_numbers(rtn, tmp_path, diverging):
    diverging(0)
    command = ("generate", rtn, "--output", tmp_path / "a", "--steps", 2, *LABELS, "--json")
    result = invoke(*command)
    assert json.loads(result.stdout)["not_finite"] == 1 and "1 of 2 hold values that are not finite" in result.stderr
    diverging(slice(None))
    assert "2 of 2" in invoke(*command, "--overwrite", exit_code=1).stderr


def test_compare_keeps_its_table_where_a_model_has_diverged(rtn, dit_folder, tmp_path, diverging, small_pictures):
    diverging(slice(None))
    given = ("--output", tmp_path, "--no-layers", "--steps", 2, *LABELS, "--json")
    shutil.copytree(rtn, tmp_path / "twin")
    result = invoke("compare", dit_folder, rtn, tmp_path / "twin", *given[:1], tmp_path / "c", *given[2:])
    content = json.loads(result.stdout)
    assert [row["psnr_db"] for row in content["models"]] == ["nan", "nan"]
    assert "its pictures are not finite" in result.stderr and not (tmp_path / "c" / "quality_size.png").exists()


def test_compare_looks_for_every_model_before_it_runs_one(rtn, dit_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_dq.commands.compare.load_pipeline", lambda *args: pytest.fail("it loads"))
    given = ("--output", tmp_path / "c", *LABELS)
    assert "there is no folder" in invoke("compare", dit_folder, rtn, tmp_path / "none", *given, exit_code=1).stderr
    assert not (tmp_path / "c").exists(), "a command that fails at once leaves nothing"


def test_compare_runs_the_seeds_it_is_given(rtn, dit_folder, tmp_path, small_pictures):
    def psnr(seed):
        given = ("--output", tmp_path / str(seed), "--no-layers", "--steps", 2, "--seed", seed, *LABELS, "--json")
        return json.loads(invoke("compare", dit_folder, rtn, *given).stdout)["models"][0]["psnr_db"]

    pipes = [DiTPipeline.from_pretrained(folder) for folder in (dit_folder, rtn)]
    expected = dq.compare(*pipes, [dict(class_labels=[3, 5])], num_inference_steps=2, seed=5, layers=False)
    assert psnr(5) == expected.mean_psnr != psnr(0)


def test_an_argument_with_an_option_of_its_own_is_refused(dit_folder, tmp_path):
    for name, option in (("class_labels=[3]", "--class-labels"), ("guidance_scale=2", "--guidance")):
        result = invoke("generate", dit_folder, "--output", tmp_path / "g", "--argument", name, exit_code=2)
        assert f"option of its own, {option}" in " ".join(result.stderr.replace("│", "").split())


def test_inspect_says_what_a_folder_lacks(tmp_path):
    assert "holds neither a pipeline" in invoke("inspect", tmp_path, exit_code=1).stderr


def test_a_reader_that_goes_away_is_no_traceback(rtn):
    code = "from diffusers_dq_cli import app; app(prog_name='diffusers-dq')"
    command = f'{sys.executable} -c "{code}" inspect {rtn} --json | true; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n" and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_a_video_is_one_animated_file(tmp_path, monkeypatch):
    frames = np.linspace(0, 1, 2 * 3 * 4 * 4 * 3).reshape(2, 3, 4, 4, 3)
    monkeypatch.setattr("diffusers_dq.commands.generate.run_call", lambda *args, **kwargs: frames)
    monkeypatch.setattr("diffusers_dq.commands.generate.load_pipeline", lambda *args: tiny_pipeline())
    result = invoke("generate", "owner/name", "--output", tmp_path, "--steps", 2, *LABELS)
    names = ["seed-0-00.webp", "seed-0-01.webp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names and names[1] in result.stdout
    with Image.open(tmp_path / names[1]) as video:
        assert video.n_frames == 3 and video.size == (4, 4)


def test_a_text_to_video_pipeline_from_end_to_end(tmp_path):
    """Open-Sora of random weights, through calibrate, quantize and generate."""
    torch.manual_seed(0)
    example = run_path(str(Path(__file__).parents[2] / "examples" / "open_sora.py"))
    example["full_precision"]("1.0", True).save_pretrained(tmp_path / "v")
    given = ("--prompt", "a lighthouse", "--steps", 2, "--device", "cpu")
    sizes = [x for text in ("height=32", "width=32", "num_frames=2") for x in ("--argument", text)]
    invoke("quantize", tmp_path / "v", "--output", tmp_path / "q", "--method", "viditq", *given, *sizes)
    content = json.loads(
        invoke("generate", tmp_path / "q", "--output", tmp_path / "g", *given, *sizes, "--json").stdout
    )
    with Image.open(content["pictures"][0]["file"]) as video:
        assert video.format == "WEBP" and video.n_frames > 1


def test_statistics_are_not_overwritten_unasked(dit_folder, tmp_path):
    command = ("calibrate", dit_folder, "--output", tmp_path / "s", "--steps", 2, *LABELS)
    invoke(*command)
    before = (tmp_path / "s").read_bytes()
    assert f"{tmp_path / 's'} is there already: --overwrite" in invoke(*command, exit_code=1).stderr
    assert (tmp_path / "s").read_bytes() == before
    invoke(*command[: -len(LABELS)], *LABELS, "--seed", 3, "--overwrite")
    assert dq.Statistics.load(tmp_path / "s").about["seed"] == 3


def test_what_was_learned_for_other_bits_is_replaced_only_with_overwrite(dit_folder, tmp_path, monkeypatch):
    learned = ("--option", "rounding=adaround", "--option", 'reconstruction={"iterations": 1, "unit": "block"}')
    given = ("--method", "ptq4dit", "--steps", 3, *LABELS, *learned)
    command = ("quantize", dit_folder, "--output", tmp_path / "q", *given)
    with monkeypatch.context() as patch:

        def interrupted(*args):
            raise KeyboardInterrupt

        patch.setattr("diffusers_dq.commands.quantize.save", interrupted)
        invoke(*command, "--weight-bits", 4, exit_code=130)
    other = (*command, "--weight-bits", 8)
    assert f"or delete {tmp_path / 'q.reconstruction'}" in invoke(*other, exit_code=1).stderr
    assert "starting anew" in invoke(*other, "--overwrite").stderr
    assert not (tmp_path / "q.reconstruction").exists()


@pytest.mark.parametrize("guidance", ["nan", "inf"])
def test_a_guidance_that_is_no_number_is_refused(dit_folder, tmp_path, guidance):
    given = ("--output", tmp_path / "g", "--guidance", guidance)
    assert "must be a number" in " ".join(invoke("generate", dit_folder, *given, exit_code=2).stderr.split())
