# SPDX-License-Identifier: Apache-2.0
"""Completion of options and their values from a list, since to ask the commands themselves takes seconds a key."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

COMPLETING = "_DIFFUSERS_DQ_COMPLETE"  # in the environment of a call by the shell's completion
LIST = Path(__file__).with_name("options.json")  # written by docs/generate.py, compared with the commands by a test


def listed(name: str) -> Any:
    """The command, or group of commands, `name` with the options of the list and nothing behind them."""
    content = json.loads(LIST.read_text(encoding="utf-8"))
    parent = typer.Typer(add_completion=False)
    if "commands" in content[name]:
        group = typer.Typer()
        for command, options in content[name]["commands"].items():
            group.command(command)(_stand_in(options))
        parent.add_typer(group, name=name)
    else:
        parent.command(name)(_stand_in(content[name]))
    parent.callback()(lambda: None)
    return typer.main.get_group(parent).commands[name]


def _stand_in(options: Mapping[str, Mapping[str, Any]]) -> Any:
    def nothing(**given: Any) -> None: ...

    kinds: list[Any] = [Annotated[list[str] | None, typer.Argument()]]
    for names, option in options.items():
        kind = bool | None if option["flag"] else list[str] | None
        values = _among(option["values"])
        kinds.append(Annotated[kind, typer.Option(*names.split(), help=option["help"], autocompletion=values)])
    nothing.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(f"p{i}", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            for i, kind in enumerate(kinds)
        ]
    )
    return nothing


def _among(values: Sequence[str]) -> Callable[[str], list[str]]:
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]
