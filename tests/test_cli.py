# SPDX-License-Identifier: Apache-2.0
"""The command line, from end to end at sizes where nothing takes time."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from diffusers_dq.benchmark import plan
from diffusers_dq.benchmark.variants import VARIANTS
from diffusers_dq.cli import app
from diffusers_dq_cli import COMMANDS, load

runner = CliRunner()
TINY = ("--layers", 1, "--heads", 2, "--head-dim", 32, "--tokens", 16, "--batch", 1, "--rounds", 1, "--device", "cpu")


def run(*arguments, exit_code=0):
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output + str(result.exception)
    return result.output


@pytest.mark.slow
def test_the_dry_run_goes_through_everything_and_resumes(tmp_path):
    output = tmp_path / "dry.json"
    text = run("benchmark", "all", "--dry-run", "--profile", "--output", output)
    content = json.loads(output.read_text())
    groups = {(group["kind"], group["name"]): group for group in content["groups"]}
    assert len(groups) == len(plan.dry_plan())
    assert not [group["failed"] for group in groups.values() if "failed" in group]
    headline = groups["step", "dit-512"]["rows"]
    assert {row["name"] for row in headline} == set(VARIANTS)
    assert all("median_ms" in row for row in headline if row["kind"] != "peer"), "ours and bf16 work everywhere"
    assert content["about"]["settings"]["backend"] == "aot_eager"
    profiles = [row["profile"] for row in headline if "failed" not in row]
    assert all(profile["ms"] > 0 and 0 < len(profile["entries"]) <= 10 for profile in profiles)
    assert "profile" not in groups["pipeline", "dit-256"]["rows"][0]
    assert text.count("Where the time goes") == sum(kind == "step" for kind, _ in groups)
    assert all(bar["met"] is None for bar in content["bars"]), "tiny sizes prove nothing"
    assert "not measured" in text and f"written: {output}" in text
    again = run("benchmark", "all", "--dry-run", "--profile", "--output", output, "--resume")
    assert again.count("measured already") == len(groups)


def test_a_budget_leaves_the_rest_for_later(tmp_path):
    output = tmp_path / "dry.json"
    text = run("benchmark", "all", "--dry-run", "--output", output, "--budget", -1)
    assert "left for --resume: peak 128x128x128, gemm" in text


def test_one_shape_one_model_and_one_pipeline(tmp_path, monkeypatch):
    monkeypatch.setitem(plan.PEAK_SIZE, "cpu", 64)
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    run("benchmark", "gemm", "32x16x16", "--rounds", 1, "--device", "cpu", "--output", tmp_path / "gemm.json")
    step = ("step", "dit-256", "--contestant", "RTN W8A8 dynamic", "--mode", "eager")
    run("benchmark", *step, *TINY, "--output", tmp_path / "step.json")
    run("benchmark", "pipeline", "dit-256", "--steps", 1, *TINY, "--output", tmp_path / "pipeline.json")
    groups = [json.loads((tmp_path / f"{name}.json").read_text())["groups"] for name in ("gemm", "step", "pipeline")]
    assert [group[-1]["name"] for group in groups] == ["32x16x16", "dit-256", "dit-256"]
    assert [row["mode"] for row in groups[1][-1]["rows"]] == ["eager", "compiled", "eager"], "bf16 runs in both"
    assert all(row["latents_per_second"] > 0 for row in groups[2][-1]["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "sdxl"], "no benchmark model 'sdxl'; known: dit-512"),
        (["step", "dit-256", "--tokens", "7"], "tokens must be a square number"),
        (["step", "dit-256", "--contestant", "GGUF"], "no contestant named GGUF"),
        (["step", "dit-256", "--mode", "fast"], "mode must be eager or compiled, got fast"),
        (["gemm", "12x13"], "a shape is MxNxK"),
        (["pipeline", "flux"], "the pipeline benchmark knows DiT"),
        (["all", "--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["gemm", "8x8x8", "--device", "cpu", "--output", "/"], "/ is a directory; give --output the name of a file"),
    ],
)
def test_a_mistake_is_a_message_and_nothing_is_measured(arguments, message):
    text = run("benchmark", *arguments, exit_code=1)
    assert f"error: {message}" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("command", [["all", "--dry-run"], ["gemm", "8x8x8"], ["step", "flux"], ["pipeline"]])
def test_a_place_that_cannot_be_written_is_found_before_anything_is_measured(tmp_path, monkeypatch, command):
    monkeypatch.setattr("diffusers_dq.commands.benchmark.Session.run", lambda *args: pytest.fail("it measures"))
    (tmp_path / "file").write_text("something")
    output = tmp_path / "file" / "r.json"
    text = run("benchmark", *command, "--device", "cpu", "--output", output, exit_code=1)
    assert f"error: {output} cannot be written" in text and "give --output a file in a directory" in text
    assert len(text.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("content", ["", "{", '{"format_version": 1}', '{"my": "shopping list"}'])
def test_a_file_that_is_none_of_ours_is_not_resumed(tmp_path, content):
    output = tmp_path / "r.json"
    output.write_text(content)
    arguments = ("gemm", "8x8x8", "--device", "cpu", "--resume", "--output", output)
    text = run("benchmark", *arguments, exit_code=1)
    assert text.startswith(f"error: {output} ") and len(text.strip().splitlines()) == 1
    assert output.read_text() == content


@pytest.mark.parametrize("given", [("--threads", 0), ("--threads", -2), ("--max-seconds", -1)])
@pytest.mark.parametrize("command", ["all", "gemm", "step", "pipeline"])
def test_numbers_that_cannot_be_are_a_usage_error(command, given, monkeypatch):
    monkeypatch.setattr("diffusers_dq.commands.benchmark.Run.measure", lambda *args: pytest.fail("it measures"))
    text = " ".join(run("benchmark", command, *given, exit_code=2).split())
    assert f"Invalid value for '{given[0]}'" in text and "Usage:" in text


def test_a_disk_that_fills_up_is_a_message(tmp_path, monkeypatch):
    def full(results):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(plan.PEAK_SIZE, "cpu", 64)
    monkeypatch.setattr("diffusers_dq.benchmark.results.Results.save", full)
    arguments = ("gemm", "8x8x8", "--rounds", 1, "--device", "cpu", "--output", tmp_path / "r.json")
    assert "error: [Errno 28] No space left on device" in run("benchmark", *arguments, exit_code=1)


def test_the_report_goes_into_the_readme_it_is_given(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmarks: begin (generated) -->\n<!-- benchmarks: end -->\n")
    (tmp_path / "old.json").write_text("{}")
    arguments = ("--device", "cpu", "--rounds", 1, "--output", tmp_path / "new.json")
    run("benchmark", "gemm", "8x8x8", *arguments)
    text = run("benchmark", "report", "--results", tmp_path, "--readme", readme)
    assert "no step measured: no plot" in text and "not shown: old.json" in text
    assert "new.json" in readme.read_text()


def test_a_report_of_nothing_leaves_the_readme_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmarks: begin (generated) -->\ntables\n<!-- benchmarks: end -->\n")
    for folder in (tmp_path / "missing", tmp_path):
        text = run("benchmark", "report", "--results", folder, "--readme", readme, exit_code=1)
        assert "holds no results to report" in text and "tables" in readme.read_text()
        (tmp_path / "damaged.json").write_text("{")


def test_results_in_the_usual_place_are_replaced_only_when_told(tmp_path, monkeypatch):
    monkeypatch.setitem(plan.PEAK_SIZE, "cpu", 64)
    monkeypatch.setattr("diffusers_dq.benchmark.environment.results_folder", lambda: tmp_path)
    arguments = ("benchmark", "gemm", "8x8x8", "--rounds", 1, "--device", "cpu")
    run(*arguments)
    (results,) = tmp_path.glob("gemm-*.json")
    before = results.read_text()
    assert "holds results already: --resume" in run(*arguments, exit_code=1)
    assert results.read_text() == before
    run(*arguments, "--overwrite")
    assert results.read_text() != before


def test_help_names_the_commands():
    text = run("benchmark", "--help")
    assert all(name in text for name in ("all", "gemm", "step", "pipeline", "report"))


def outside(*arguments, **environment):
    """A command in a process of its own, as a shell runs it."""
    code = "from diffusers_dq_cli import app; app(prog_name='diffusers-dq')"
    return subprocess.run(
        [sys.executable, *arguments[:-1], "-c", code, *arguments[-1]],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip


def test_help_and_completion_of_names_import_neither_torch_nor_diffusers():
    done = outside("-X", "importtime", ["--help"])
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported, "the list of imports is there"
    assert not imported & {"torch", "diffusers", "diffusers_dq", "numpy", "transformers"}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("qu", ["quantize"]),
        ("quantize model --me", ["--method"]),
        ("quantize model --method q", ["qdiffusion", "qdit", "quarot"]),
        ("quantize model --preset ", ["quality", "balanced", "speed", "paper"]),
        ("generate model --dtype b", ["bfloat16"]),
        ("push model me/name --pu", ["--public"]),
        ("benchmark st", ["step"]),
        ("benchmark step --cont", ["--contestant"]),
    ],
)
def test_completion_of_names_options_and_values_without_torch(line, offered):
    words = ["diffusers-dq", *line.split(" ")]
    told = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    code = "import sys; sys.modules['torch'] = None; from diffusers_dq_cli import app; app(prog_name='diffusers-dq')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, "_DIFFUSERS_DQ_COMPLETE": "complete_bash", **told},
    )  # fmt: skip
    assert done.stdout.split() == offered, done.stderr


def test_every_command_can_be_loaded_and_says_what_it_does():
    assert list(COMMANDS) == [
        "demo", "calibrate", "quantize", "generate", "compare", "inspect", "evaluate", "benchmark", "push", "doctor",
    ]  # fmt: skip
    for name in COMMANDS:
        text = " ".join(run(name, "--help").split())
        assert f"Usage: diffusers-dq {name}" in text and "--help" in text
    summaries = {name: " ".join(load(name).help.split()) for name in COMMANDS if name != "evaluate"}
    assert {name: text for name, text in summaries.items() if not text.startswith(COMMANDS[name][1])} == {}


def test_options_of_one_meaning_have_one_name_and_one_help():
    options = {}
    own = {"output", "checkpoint", "model"}  # a file, a folder
    for name in COMMANDS:
        for parameter in getattr(load(name), "params", ()):
            if parameter.param_type_name == "option" and parameter.name not in own:
                options.setdefault(parameter.name, {}).setdefault((*parameter.opts, parameter.help), []).append(name)
    several = {name: found for name, found in options.items() if len(found) > 1}
    assert len(options) > 30 and several.keys() <= {"seed", "batch", "steps", "images", "overwrite"}, several
    assert all(opts[0].startswith("--") for found in options.values() for *opts, _ in found)


def test_every_command_but_none_answers_in_json():
    for name in COMMANDS:
        command = load(name)
        for part in getattr(command, "commands", {name: command}).values():
            assert "--json" in {opt for parameter in part.params for opt in parameter.opts}, part.name


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["calibrat"], 2, "No such command 'calibrat'. Did you mean 'calibrate'"),
        (["calibrate", "model"], 2, "Missing option '--output'"),
        (["generate", "model", "--output", "{tmp}/o", "--prompt", "a", "--class-labels", "1"], 2, "give one of"),
        (["generate", "model", "--output", "{tmp}/o", "--class-labels", "3-x"], 2, "--class-labels are numbers"),
        (["generate", "model", "--output", "{tmp}/o", "--calls", "{tmp}/none"], 2, "is no JSON file"),
        (["quantize", "model", "--output", "{tmp}/o"], 2, "give --preset (quality, balanced, speed), --method"),
        (["quantize", "model", "--output", "{tmp}/o", "--method", "rtm"], 2, "rtm"),
        (["quantize", "model", "--output", "{tmp}/o", "--method", "rtn", "--weight-bits", "5"], 2, "5"),
        (["quantize", "model", "--output", "{tmp}/o", "--method", "rtn", "--option", "colour=red"], 2, "colour"),
        (["quantize", "model", "--output", "{tmp}/o", "--config", "c", "--method", "rtn"], 2, "leave out --method"),
        (["inspect", "{tmp}/none"], 1, "error: there is no folder"),
        (["generate", "{tmp}/none", "--output", "{tmp}/o"], 1, "error: there is no folder"),
        (["calibrate", "{tmp}", "--output", "{tmp}/s"], 1, "holds no model_index.json"),
        (["calibrate", "{tmp}", "--output", "{tmp}/no/s"], 1, "there is no folder {tmp}/no to write s to"),
        (["generate", "{tmp}", "--output", "{tmp}/o", "--device", "tpu9"], 2, "--device must be a device of torch"),
        (["push", "{tmp}", "noslash"], 2, "OWNER/NAME is a repository's"),
    ],
)  # fmt: skip
def test_exit_codes_and_messages_of_mistakes(arguments, code, message, tmp_path):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    result = runner.invoke(app, arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == "" and "Traceback" not in result.output
    assert message.format(tmp=tmp_path).replace(" ", "") in "".join(result.stderr.replace("│", "").split())
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1


def test_what_is_no_error_of_ours_is_one_line_too_and_a_traceback_when_asked_for(monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("diffusers_dq.commands.inspect.load_pipeline", broken)
    result = runner.invoke(app, ["inspect", "owner/name"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ZeroDivisionError: division by zero (diffusers-dq --traceback")
    assert len(result.stderr.splitlines()) == 1
    assert isinstance(runner.invoke(app, ["--traceback", "inspect", "owner/name"]).exception, ZeroDivisionError)


def test_ctrl_c_is_exit_code_130(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusers_dq.commands.inspect.load_pipeline", interrupted)
    result = runner.invoke(app, ["inspect", "owner/name"])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
