# SPDX-License-Identifier: Apache-2.0
"""The command `diffusers-dq`: names and summaries, and what is common to all commands.

A package of its own, since `import diffusers_dq` imports torch and diffusers: the list of commands and completion need
neither. The module of a command is imported when that command is called.

Exit codes: 0 done; 1 an error, one line of which is on stderr; 2 the command was written wrongly; 130 Ctrl-C.
"""

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from diffusers_dq_cli.completion import COMPLETING, listed

INTERRUPTED = 130  # 128 and the number of SIGINT, as shells count
_PACKAGE = "diffusers_dq.commands"

# name -> (module:attribute, summary)
COMMANDS = {
    "demo": (f"{_PACKAGE}.demo:demo", "Quantize the trained demo model six ways: a table and pictures, no download."),
    "calibrate": (f"{_PACKAGE}.calibrate:calibrate", "Observe a model's activations over its denoising steps."),
    "quantize": (f"{_PACKAGE}.quantize:quantize", "Quantize a pipeline's transformer and save the pipeline."),
    "generate": (f"{_PACKAGE}.generate:generate", "Make pictures with a pipeline, quantized or not."),
    "compare": (
        f"{_PACKAGE}.compare:compare",
        "Run models on the same seeds: how far apart, where, and pictures of it.",
    ),
    "inspect": (f"{_PACKAGE}.inspect:inspect", "What each linear of a model is: bits, bytes, kernel, and why."),
    "evaluate": (f"{_PACKAGE}.evaluate:evaluate", "Sample thousands of pictures and measure them: FID."),
    "benchmark": (f"{_PACKAGE}.benchmark:app", "Speed and size against full precision and the peers."),
    "push": (f"{_PACKAGE}.push:push", "Upload a quantized pipeline with its model card to the Hub."),
    "doctor": (f"{_PACKAGE}.doctor:doctor", "Which kernels run on this machine and why, and what to install."),
}

app = typer.Typer(
    name="diffusers-dq",
    help="Post-training quantization of diffusion transformers inside diffusers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(metadata.version("diffusers-dq"))
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="where an error comes from, not its line alone")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="of the package", callback=_version, is_eager=True)
    ] = False,
) -> None:
    context.obj = {"traceback": traceback}


class Later(TyperCommand):
    """Stands for a command in the list; becomes it when it is called, completed or asked for help."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if COMPLETING in os.environ:
            return listed(str(self.name)).make_context(info_name, args, parent=parent, **extra)
        traceback = bool(((parent and parent.obj) or {}).get("traceback"))
        return load(str(self.name), traceback).make_context(info_name, args, parent=parent, **extra)


def load(name: str, traceback: bool = False) -> Any:
    """The command itself, with its options. Imports torch and diffusers."""
    place, summary = COMMANDS[name]
    module, _, attribute = place.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    parent = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    if isinstance(found, typer.Typer):
        group = typer.Typer(no_args_is_help=True, help=summary)
        for command in found.registered_commands:
            _add(group, command.name, command.callback, traceback)
        parent.add_typer(group, name=name)
    else:
        _add(parent, name, found, traceback)
    parent.callback()(_nothing)  # or a Typer of one command would be that command
    return typer.main.get_group(parent).commands[name]


def _add(group: typer.Typer, name: str | None, function: Any, traceback: bool) -> None:
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)  # the terminal breaks the lines
    group.command(name, help=text)(function if traceback else told(function))


def _nothing() -> None: ...


def told(function: Callable[..., None]) -> Callable[..., None]:
    """An error is one line on stderr and exit code 1, and not a traceback. Ctrl-C is exit code 130."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as stop:
            typer.echo(f"interrupted{': ' * bool(stop.args)}{' '.join(map(str, stop.args))}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains once more when it ends
            raise typer.Exit(1) from None
        except Exception as error:
            if hasattr(error, "exit_code"):  # typer's own, of a wrong option
                raise
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(1) from None

    run.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return run


def one_line(error: Exception) -> str:
    """What it says, with its kind where that is none of those that the package raises on purpose."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, TypeError, ImportError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text or 'without a message'} (diffusers-dq --traceback ... shows where)"


for _name, (_, _summary) in COMMANDS.items():
    app.command(_name, cls=Later, help=_summary)(_nothing)
