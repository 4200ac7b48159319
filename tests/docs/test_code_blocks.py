# SPDX-License-Identifier: Apache-2.0
"""Every code block of README.md and docs/ runs, with small stand-ins for models of the Hub (code_blocks.py)."""

import json
import re
import shlex
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline

import diffusers_dq as dq
import diffusers_dq_cli
from diffusers_dq_cli import COMMANDS, load
from diffusers_dq_cli.completion import LIST
from docs.code_blocks import PAGES, ROOT, Block, blocks, expected, stand_ins

tomllib = pytest.importorskip("tomllib")  # Python 3.11

SHELL = ("bash", "sh", "shell", "console")
PYTHON_PAGES = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_runs_from_the_top_of_the_page_to_its_end(page, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    work.mkdir()
    (work / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(work)
    namespace: dict[str, Any] = {"__name__": "page"}
    with stand_ins(tmp_path), torch.random.fork_rng():
        for block in blocks(page):
            if block.language == "python" and not block.reason:
                run(block, namespace)


def run(block: Block, namespace: dict[str, Any]) -> None:
    """With the line numbers of the page, so that a traceback points there."""
    namespace.update(expected(block), __file__=str(block.source))
    above = "\n" * (block.line - 1 if block.source == PAGES[block.page] else 0)
    exec(compile(above + block.code, str(block.source), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_python_shell_or_output(page):
    for block in blocks(page):
        assert block.language in ("python", *SHELL, "text"), f"{block}: nothing checks a block of {block.language!r}"


def test_what_is_not_executed_is_rare_and_says_why():
    reasons = {str(block): block.reason for page in PAGES for block in blocks(page) if block.reason}
    assert all(len(reason.split()) > 3 for reason in reasons.values()), reasons
    assert len(reasons) <= 2, f"more and more blocks are not executed: {reasons}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    for block in blocks(page):
        if block.language in SHELL:
            for line in block.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words:
                    assert not (problem := wrong_with(words)), f"{block}: `{line}`: {problem}"


def wrong_with(words: list[str]) -> str:
    """Of a shell command: what does not exist, or "" if all does."""
    match words:
        case ["make", *targets]:
            known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            return ", ".join(f"no target {target}" for target in targets if target not in known and "=" not in target)
        case ["python", script, *_] if script.endswith(".py"):
            return "" if (ROOT / script).exists() else f"no file {script}"
        case ["pip", "install", *what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            asked = [extra for word in what for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.+)\]", word)))]
            return ", ".join(f"no extra {extra}" for extra in asked if extra not in extras)
        case ["diffusers-dq", "--install-completion"]:
            return ""
        case ["diffusers-dq", name, *arguments]:
            return wrong_with_arguments(load(name), arguments) if name in COMMANDS else f"no command {name}"
        case ["accelerate", "launch", *rest] if "diffusers-dq" in rest:
            return wrong_with(rest[rest.index("diffusers-dq") :])
    return "nothing here knows this command: teach wrong_with, or write it as text"


def wrong_with_arguments(command: Any, arguments: list[str]) -> str:
    """What the command itself says to them, without running it."""
    while arguments and hasattr(command, "commands"):
        if arguments[0] not in command.commands:
            return f"no command {arguments[0]}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    try:
        command.make_context(command.name, list(arguments))
    except Exception as error:
        if not hasattr(error, "format_message"):  # of typer's own errors alone
            raise
        return str(error.format_message())
    return ""


def test_wrong_commands_are_found():
    assert wrong_with(["make", "coffee"]) == "no target coffee"
    assert wrong_with(["python", "examples/none.py"]) == "no file examples/none.py"
    assert wrong_with(["pip", "install", ".[eval,none]"]) == "no extra none"
    assert "No such option: --nonesuch" in wrong_with(["diffusers-dq", "evaluate", "MODEL", "--nonesuch", "1"])
    assert "Missing" in wrong_with(["diffusers-dq", "evaluate", "MODEL"])
    assert "valid integer" in wrong_with(["diffusers-dq", "evaluate", "MODEL", "-o", "OUT", "--images", "many"])
    assert "expected one of float32" in wrong_with(["diffusers-dq", "inspect", "MODEL", "--dtype", "int8"])
    assert wrong_with(["diffusers-dq", "none"]) == "no command none"
    assert wrong_with(["curl", "x"])
    assert not wrong_with(["diffusers-dq", "evaluate", "MODEL", "--output", "OUT", "--images", "5000"])


def test_the_page_on_commands_has_all_of_them_and_their_exit_codes():
    page = (ROOT / "docs" / "commands.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(COMMANDS)
    said = re.search(r"Exit codes: (.+?)\.$", diffusers_dq_cli.__doc__ or "", re.MULTILINE)
    assert said and re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == re.findall(r"\b\d+(?= )", said[1])
    offered = {name for command in json.loads(LIST.read_text()).values() for name in _completed(command)}
    listed = page.partition("and the values of ")[2].partition("are completed")[0]
    assert set(re.findall(r"`(--[\w-]+)`", listed)) == offered


def _completed(options: dict[str, Any]) -> set[str]:
    """Those whose values completion offers."""
    return {names.split()[0] for names, option in options.items() if isinstance(option, dict) and option.get("values")}


def test_the_hubs_stand_in_keeps_branches_apart(tmp_path):
    """Or a page that loads another revision than it pushed would run."""
    with stand_ins(tmp_path):
        pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
        dq.quantize(pipe, dq.DQConfig("rtn"), progress=False)
        dq.push_to_hub(pipe, "me/x", revision="candidate")
        assert DiTPipeline.from_pretrained("me/x", revision="candidate").transformer.is_quantized
        with pytest.raises(OSError):
            DiTPipeline.from_pretrained("me/x", local_files_only=True)
