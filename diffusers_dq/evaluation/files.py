# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, whoever is interrupted."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """`write(file)`, under another name until it is complete. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with half.open("wb") as file:
            write(file)
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Strict JSON: numbers that are not finite become "inf", "-inf" or "nan", which `float` reads back."""
    text = json.dumps(_strict(content), indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def _strict(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _strict(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_strict(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return content
