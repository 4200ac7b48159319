# SPDX-License-Identifier: Apache-2.0
"""Named parts that announce themselves: a new one is a file and a decorator, no list to edit."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to what was registered under it.

    kind: what the entries are, in the words of an error message ("method", "model spec").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator. Raises ValueError when another entry has the name."""

        def add(entry: T) -> T:
            if self._entries.setdefault(name, entry) is not entry:
                raise ValueError(f"a {self.kind} named {name!r} is registered already: {self._entries[name]!r}")
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """Raises ValueError that lists the known names."""
        if name not in self._entries:
            known = f"known: {', '.join(sorted(self._entries)) or 'none'}"
            raise ValueError(f"unknown {self.kind} {name!r}; {known}{meant(name, self._entries)}")
        return self._entries[name]

    def get(self, name: str) -> T | None:
        return self._entries.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))


def meant(name: Any, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f". Did you mean {near[0]!r}?" if near else ""


def import_submodules(package: str) -> None:
    """Import every module of a package, so that each registers what it holds."""
    path = importlib.import_module(package).__path__
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
