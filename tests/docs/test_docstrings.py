# SPDX-License-Identifier: Apache-2.0
"""What a public docstring names in backticks is something that its reader can look up."""

import builtins
import importlib
import inspect
import keyword
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import diffusers_dq as dq

REFERENCE = Path(__file__).parents[2] / "docs" / "reference.md"
SHOWN = re.findall(r"^::: ([\w.]+)$", REFERENCE.read_text(), re.MULTILINE)
MODULES = ("torch", "diffusers", "numpy", "math", "json")  # whose names may be said in full
NAME = re.compile(r"`(_?[A-Za-z]\w*(?:\.\w+)*)(?:\(.*?\))?`")
# Of diffusers: its pipelines, their loading, and FLUX's names of layers.
KNOWN = {"pipe", "from_pretrained", "proj_out", "single_transformer_blocks.0.proj_out"}


def resolve(name: str) -> Any:
    """The object of a dotted name, module first."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def members(shown: Any) -> Iterator[tuple[str, Any]]:
    """(name, object) of what the reference renders of it: itself, and of a class its public members."""
    yield "", shown
    if inspect.isclass(shown):
        for name, value in vars(shown).items():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if not name.startswith("_") and callable(function):
                yield name, function


def names_of(thing: Any) -> set[str]:
    """Of its parameters and, of a class, attributes."""
    found = set()
    if callable(thing):
        with suppress(ValueError):
            found |= set(inspect.signature(thing).parameters)
    if inspect.isclass(thing):
        found |= set(dir(thing)) | set(getattr(thing, "__annotations__", {}))
        found |= set(getattr(thing, "__dataclass_fields__", {}))
    return found


def known(name: str, own: set[str]) -> bool:
    first, _, rest = name.partition(".")
    if name in KNOWN or keyword.iskeyword(name) or hasattr(builtins, first):
        return True
    if first in own:
        return True  # of a parameter, whose type says what it has
    public = {full.rpartition(".")[2]: full for full in SHOWN}
    try:
        if first == "dq":
            return bool(rest) and resolve(f"diffusers_dq.{rest}") is not None
        if first in public:
            return (
                not rest or resolve(f"{public[first]}.{rest}") is not None or rest in names_of(resolve(public[first]))
            )
        if first in MODULES:
            return resolve(name) is not None
    except AttributeError:
        return rest in names_of(resolve(public[first])) if first in public else False
    return False


def unknown_in(shown: str) -> list[str]:
    thing = resolve(shown)
    everything = names_of(thing) | {name for name, _ in members(thing)}
    missing = []
    for name, member in members(thing):
        own = everything | names_of(member)
        for said in NAME.findall(inspect.getdoc(member) or ""):
            if not known(said, own):
                missing.append(f"{shown}{'.' * bool(name)}{name}: `{said}`")
    return missing


@pytest.mark.parametrize("shown", SHOWN)
def test_names_in_docstrings_can_be_looked_up(shown):
    assert not (missing := unknown_in(shown)), f"the reference has no {missing}"


def test_a_name_that_is_nowhere_is_found():
    def function(pipe: Any) -> None:
        """As `pipe.x`, `dq.compare`, `torch.float32`, `Statistics.load`, not `repository.explained`, `make_card`."""

    own = names_of(function)
    said = NAME.findall(inspect.getdoc(function))
    assert [name for name in said if not known(name, own)] == ["repository.explained", "make_card"]
    assert dq.__all__
