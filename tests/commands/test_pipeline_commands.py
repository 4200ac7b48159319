# SPDX-License-Identifier: Apache-2.0
"""calibrate, quantize, generate, compare, inspect and push, from end to end on a tiny model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image
from typer.testing import CliRunner

import diffusers_dq as dq
from diffusers_dq.cli import app
from diffusers_dq.commands import calibrate as calibrate_module
from diffusers_dq.denoise import run_call

runner = CliRunner()
LABELS = ("--class-labels", "3,5-7", "--batch", 2, "--guidance", 1.5, "--device", "cpu")  # two calls of two
CALLS = [dict(class_labels=labels, guidance_scale=1.5) for labels in ([3, 5], [6, 7])]


def invoke(*arguments, exit_code=0):
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output + repr(result.exception)
    return result


def answer(*arguments):
    """What --json says, and nothing else on stdout."""
    return json.loads(invoke(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def made(dit_folder, tmp_path_factory):
    """A folder with statistics and two quantized models, rtn and htg, made by the commands."""
    folder = tmp_path_factory.mktemp("made")
    invoke("calibrate", dit_folder, "--output", folder / "s.safetensors", "--steps", 6, *LABELS)
    for method in ("rtn", "htg"):
        bits = ("--weight-bits", 4, "--activation-bits", 8)
        given = ("--method", method, *bits, "--statistics", folder / "s.safetensors", "--device", "cpu")
        invoke("quantize", dit_folder, "--output", folder / method, *given)
    return folder


def test_calibrate_writes_what_the_function_returns(made, dit_folder):
    found = dq.Statistics.load(made / "s.safetensors")
    pipe = DiTPipeline.from_pretrained(dit_folder)
    expected = dq.calibrate(pipe, CALLS, num_inference_steps=6, progress=False)
    assert found.about["arguments"] == expected.about["arguments"] and len(found.timesteps) == 6
    for name, site in expected.sites.items():
        assert torch.equal(found.sites[name].minimum, site.minimum), name
    assert not (made / "s.safetensors.checkpoint").exists()


def test_progress_is_on_stderr_and_the_next_command_on_stdout(dit_folder, tmp_path):
    result = invoke("calibrate", dit_folder, "--output", tmp_path / "s", "--steps", 2, *LABELS)
    assert "calibrate: 100%" in result.stderr and "calibrate: " not in result.stdout
    assert f"next: diffusers-dq quantize {dit_folder} --statistics {tmp_path / 's'}" in result.stdout


def test_ctrl_c_keeps_whole_calls_and_the_same_command_goes_on(dit_folder, tmp_path, monkeypatch):
    calls = []

    def second_is_interrupted(pipe, call, **settings):
        calls.append(settings["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_call(pipe, call, **settings)

    output = tmp_path / "s.safetensors"
    command = ("calibrate", dit_folder, "--output", output, "--steps", 3, *LABELS)
    monkeypatch.setattr("diffusers_dq.calibration.run_call", second_is_interrupted)
    monkeypatch.setattr("sys.argv", ["diffusers-dq", "calibrate", "my model"])
    result = invoke(*command, exit_code=130)
    last = result.stderr.strip().splitlines()[-1]
    assert last.endswith(
        f"1 of 2 calls are kept in {output}.checkpoint; go on with: diffusers-dq calibrate 'my model'"
    )
    assert not output.exists()
    assert f"going on from {output}.checkpoint" in invoke(*command).stderr
    assert calls == [0, 1, 1], "the first call is not made again"
    expected = dq.calibrate(DiTPipeline.from_pretrained(dit_folder), CALLS, num_inference_steps=3, progress=False)
    found = dq.Statistics.load(output)
    assert all(torch.equal(found.sites[name].tokens, site.tokens) for name, site in expected.sites.items())


def test_ctrl_c_before_the_first_call_is_whole_says_so(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_module.dq, "calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt, match="nothing is kept"):
        calibrate_module.resumable(None, [{}], tmp_path / "none", num_inference_steps=1)


def test_quantize_saves_what_the_function_makes(made, dit_folder):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    config = dq.DQConfig("htg", weight_bits=4, activation_bits=8)
    dq.quantize(pipe, config, statistics=made / "s.safetensors", progress=False)
    loaded = DiTPipeline.from_pretrained(made / "htg")
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], tensor), name


def test_quantize_calibrates_first_where_the_method_needs_it(dit_folder, tmp_path):
    given = ("--method", "htg", "--option", "groups=3", "--steps", 6, *LABELS)
    content = answer("quantize", dit_folder, "--output", tmp_path / "q", *given)
    assert content["statistics"] == str(tmp_path / "q.statistics.safetensors")
    assert dq.Statistics.load(content["statistics"]).about["calls_done"] == 2
    assert content["config"]["groups"] == 3 and content["quantized"] + len(content["kept"]) == len(content["linears"])
    boundaries = DiTPipeline.from_pretrained(tmp_path / "q").transformer.timestep_boundaries
    assert torch.isfinite(boundaries).sum(dim=1).max() == 2, "three groups"


def test_quantize_takes_a_config_file(dit_folder, tmp_path):
    dq.DQConfig("rtn", weight_bits=4, overrides={"*.ff.net.2": {"weight_bits": 8}}).to_json_file(tmp_path / "c.json")
    given = ("--config", tmp_path / "c.json", "--device", "cpu")
    content = answer("quantize", dit_folder, "--output", tmp_path / "q", *given)
    bits = {row["name"]: row["bits"] for row in content["linears"]}
    assert bits["transformer_blocks.0.ff.net.2"] == "W8A8" and bits["transformer_blocks.0.attn1.to_q"] == "W4A8"


def test_nothing_is_overwritten_unasked(dit_folder, tmp_path):
    (tmp_path / "mine").write_text("work")
    command = ("quantize", dit_folder, "--output", tmp_path, "--method", "rtn", "--device", "cpu")
    assert f"error: {tmp_path} is not empty" in invoke(*command, exit_code=1).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    invoke(*command, "--overwrite")
    assert (tmp_path / "mine").exists() and (tmp_path / "model_index.json").exists()
    own = invoke("quantize", dit_folder, "--output", dit_folder, "--method", "rtn", "--overwrite", exit_code=2)
    assert "the model's own folder" in " ".join(own.stderr.split())


def test_generate_makes_the_pictures_of_its_seeds(made, tmp_path):
    content = answer("generate", made / "htg", "--output", tmp_path, "--steps", 2, "--seed", 4, *LABELS)
    names = ["seed-4-00.png", "seed-4-01.png", "seed-5-00.png", "seed-5-01.png"]
    assert [picture["file"] for picture in content["pictures"]] == [str(tmp_path / name) for name in names]
    pipe = DiTPipeline.from_pretrained(made / "htg")
    expected = run_call(pipe, CALLS[1], num_inference_steps=2, seed=5, output_type="np")
    for i, image in enumerate(expected):
        with Image.open(tmp_path / f"seed-5-0{i}.png") as saved:
            assert np.array_equal(np.asarray(saved), (image.clip(0, 1) * 255).round().astype(np.uint8))


def test_a_class_that_the_model_does_not_have_is_a_usage_error(dit_folder, tmp_path):
    given = ("--output", tmp_path, "--class-labels", "0,1000", "--device", "cpu")
    assert "the model has the classes 0 to 999" in " ".join(
        invoke("generate", dit_folder, *given, exit_code=2).stderr.replace("│", "").split()
    )


def test_compare_several_models(made, dit_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_dq.evaluation.paired.ssim", lambda x, y: np.ones(len(x)))  # pictures of 8 x 8
    models = [made / "rtn", made / "htg"]
    given = ("--output", tmp_path, "--statistics", made / "s.safetensors", "--steps", 3, *LABELS)
    content = answer("compare", dit_folder, *models, *given)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    files = ("comparison.json", "grid.png", "layer_snr.png", "activation_ranges.png")
    assert written == {f"{name}/{file}" for name in ("rtn", "htg") for file in files} | {"quality_size.png"}
    assert {str(tmp_path / name) for name in written} == set(content["files"])
    for row, model in zip(content["models"], models, strict=True):
        assert row["bytes"] == sum(file.stat().st_size for file in (model / "transformer").glob("*.safetensors"))
        saved = json.loads((tmp_path / row["name"] / "comparison.json").read_text())
        assert row["psnr_db"] == saved["mean_psnr"] and len(row["worst_layers"]) == 5
    assert content["pictures"] == 4 and content["reference_bytes"] > content["models"][0]["bytes"]


def test_compare_one_model_and_print_a_table(made, dit_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_dq.evaluation.paired.ssim", lambda x, y: np.ones(len(x)))
    given = ("--output", tmp_path, "--no-layers", "--steps", 2, *LABELS)
    text = invoke("compare", dit_folder, made / "rtn", *given).stdout
    assert {path.name for path in tmp_path.iterdir()} == {"comparison.json", "grid.png"}
    decibels = json.loads((tmp_path / "comparison.json").read_text())["mean_psnr"]
    assert text.splitlines()[1].split()[:2] == ["rtn", f"{decibels:.2f}"]


def test_inspect_is_the_functions_table(made):
    report = dq.inspect(made / "htg")
    assert invoke("inspect", made / "htg").stdout == f"{report}\n"
    content = answer("inspect", made / "htg" / "transformer")
    assert content["bytes"] == report.nbytes and [row["name"] for row in content["linears"]] == [
        row.name for row in report.linears
    ]


def test_push_passes_everything_on(made, dit_folder, monkeypatch):
    monkeypatch.setattr("diffusers_dq.evaluation.paired.ssim", lambda x, y: np.ones(len(x)))
    given = {}

    def push_to_hub(pipe, repo_id, **settings):
        given.update(settings, pipe=pipe, repo_id=repo_id)
        return SimpleNamespace(oid="abc", commit_url="http://127.0.0.1/me/dit/commit/abc")

    monkeypatch.setattr("diffusers_dq.commands.push.push_to_hub", push_to_hub)
    checked = []
    monkeypatch.setattr(
        "diffusers_dq.commands.push.check_push", lambda *_, **settings: checked.append(settings) or "me"
    )
    options = ("--private", "--revision", "w4", "--compare-with", dit_folder, "--steps", 2, *LABELS)
    content = answer("push", made / "rtn", "me/dit", *options, "--statistics", made / "s.safetensors")
    assert content["commit"] == "abc" and content["url"].endswith("/commit/abc")
    assert (given["repo_id"], given["private"], given["revision"]) == ("me/dit", True, "w4")
    assert given["pipe"].transformer.is_quantized and len(given["comparison"].psnr) == 4
    assert given["statistics"]["transformer"].about["calls_done"] == 2 and given["upload_statistics"]
    assert given["call"] == {**CALLS[0], "num_inference_steps": 2} == checked[0]["call"]
    invoke("push", made / "rtn", "me/dit")
    assert given["comparison"] is None and given["private"] is None and given["call"] is None
