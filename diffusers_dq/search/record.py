# SPDX-License-Identifier: Apache-2.0
"""Numbers that took long to find, kept on disk so that an interrupted search goes on where it was."""

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusers_dq.files import read_json, write_json

FORMAT_VERSION = 1


class Record:
    """Values by key. With a path, each addition replaces the file at once: it is always whole.

    path: None keeps them in memory only.   settings: JSON-able, all that the values depend on.
    Raises ValueError for a file of other settings, naming what differs, or one that is not such a file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self.values: dict[str, float] = {}
        if self.path is not None and self.path.exists():
            self.values = self._read(self.path)
        elif self.path is not None and not self.path.absolute().parent.is_dir():
            raise FileNotFoundError(f"checkpoint: no folder {self.path.absolute().parent}; make it first")

    def value(self, key: str, compute: Callable[[], float]) -> float:
        """The recorded value, else what `compute` gives, recorded."""
        if key not in self.values:
            self.values[key] = float(compute())
            self._write()
        return self.values[key]

    def _read(self, path: Path) -> dict[str, float]:
        try:
            content = read_json(path)
            settings, version = dict(content["settings"]), content["format_version"]
            values = {str(key): float(value) for key, value in content["values"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"{path} is no checkpoint of a search ({error!r}); give another path to start anew"
            ) from error
        if version != FORMAT_VERSION:
            raise ValueError(f"the checkpoint {path} has format {version!r}, this diffusers_dq reads {FORMAT_VERSION}")
        for key in sorted(set(settings) | set(self.settings)):
            if settings.get(key) != self.settings.get(key):
                raise ValueError(
                    f"the checkpoint {path} is of another run: its {key} is {settings.get(key)!r}, now it is"
                    f" {self.settings.get(key)!r}. Give the same arguments to resume, or another path to start anew"
                )
        return values

    def _write(self) -> None:
        if self.path is None:
            return
        content = {"format_version": FORMAT_VERSION, "settings": self.settings, "values": self.values}
        write_json(self.path, content)


def described(value: Any) -> Any:
    """Something JSON-able by which an argument is known again: tensors and arrays by a checksum."""
    if isinstance(value, Tensor):
        value = value.detach().float().cpu().numpy()
    if is_dataclass(value) and not isinstance(value, type):
        value = {"is": name_of(value)} | {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [described(item) for item in value]
    if hasattr(value, "tobytes"):
        return f"{type(value).__name__} {getattr(value, 'shape', '')} {zlib.crc32(value.tobytes()):08x}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return name_of(value)


def name_of(value: Any) -> str:
    """Of a function its name, of another object its class."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
