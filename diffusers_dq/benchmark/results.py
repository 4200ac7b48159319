# SPDX-License-Identifier: Apache-2.0
"""The results file: what was measured, on what, group by group, as it is measured."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers_dq.benchmark.checking import check
from diffusers_dq.files import read_json, write_whole

FORMAT_VERSION = 1
Row = dict[str, Any]
Group = dict[str, Any]

_OF_ANOTHER_RUN = ("hardware", "device", "threads", "versions", "commit", "settings")


@dataclass
class Results:
    """path: where `add` writes; None keeps the results in memory.
    groups: each {"kind", "name", "settings", "rows", ...}; a row is one contestant's, with its times or "failed".
    """

    about: dict[str, Any]
    path: Path | None = None
    groups: list[Group] = field(default_factory=list)
    bars: list[dict[str, Any]] = field(default_factory=list)

    def add(self, group: Group) -> None:
        """Takes the place of an earlier group of the same part, and writes the file."""
        key = _key(group)
        self.groups = [other for other in self.groups if _key(other) != key] + [group]
        self.save()

    def holds(self, kind: str, name: str, settings: Mapping[str, Any]) -> bool:
        """Whether that part has been measured, and did not fail as a whole."""
        key = _key({"kind": kind, "name": name, "settings": dict(settings)})
        return any(_key(group) == key and "failed" not in group for group in self.groups)

    def of(self, kind: str) -> Iterator[Group]:
        return (group for group in self.groups if group["kind"] == kind)

    def int8_peak(self) -> float | None:
        """TOP/s, as the group "peak" of this run defines it; None before it has been measured."""
        return next((group.get("int8_tops") for group in self.of("peak")), None)

    def save(self) -> None:
        """All or nothing: a reader, or a crash, never meets half a file."""
        if self.path is None:
            return
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        write_whole(self.path, lambda file: file.write(text.encode()))

    def to_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, "about": self.about, "bars": self.bars, "groups": self.groups}

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Raises ValueError for a file that is not a results file of this format."""
        try:
            content = read_json(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); measure again without --resume") from None
        except ValueError as error:
            raise ValueError(f"{error}; measure again without --resume") from None
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format_version {version!r}, expected {FORMAT_VERSION}; measure again without --resume"
            )
        try:
            check(content)
        except ValueError as error:
            raise ValueError(f"{path} is not a results file: {error}; measure again without --resume") from None
        return cls(content["about"], path, content["groups"], content["bars"])

    @classmethod
    def resume(cls, path: Path, about: dict[str, Any]) -> "Results":
        """What the file holds, to be continued; an empty one where there is no file.

        Raises ValueError where the file was measured on other hardware, software or settings.
        """
        if not path.exists():
            return cls(about, path)
        earlier = cls.load(path)
        for key in _OF_ANOTHER_RUN:
            if earlier.about.get(key) != about.get(key):
                raise ValueError(
                    f"{path} cannot be resumed: its {key} is {earlier.about.get(key)!r}, now it is {about.get(key)!r}."
                    " Give the same options on the same machine, another --output, or leave --resume out"
                )
        return earlier


def check_place(path: Path) -> None:
    """Raises ValueError where `save` could not write `path`. Leaves nothing behind, and what is there as it is."""
    missing: list[Path] = []
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a directory; give --output the name of a file, as {path / 'results.json'}")
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise ValueError(f"{path} is not a file that you may write to; give --output another name")
        missing += [folder for folder in path.parents if not folder.exists()]
        if missing:
            path.parent.mkdir(parents=True)
        with tempfile.TemporaryFile(dir=path.parent), suppress(FileNotFoundError):
            path.lstat()  # an error for a name that is too long
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}); give --output a file in a directory that you may write to"
        ) from None
    finally:
        _remove_empty(missing)


def _remove_empty(folders: Sequence[Path]) -> None:
    """folders: the innermost first; those that are not there, or not empty, stay as they are."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _key(group: Mapping[str, Any]) -> str:
    return json.dumps([group["kind"], group["name"], group["settings"]], sort_keys=True)
