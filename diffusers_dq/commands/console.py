# SPDX-License-Identifier: Apache-2.0
"""Results on stdout, for people or for machines; all else on stderr."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import typer


def emit(content: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """One JSON object, or the text. Numbers that are not finite become "inf", "-inf" or "nan", which `float` reads."""
    typer.echo(json.dumps(plain(content), indent=1, allow_nan=False) if as_json else text)


def plain(content: Any) -> Any:
    """With nothing in it that strict JSON does not have."""
    if isinstance(content, Mapping):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain(value) for value in content]
    if isinstance(content, Path):
        return str(content)
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return content


def note(text: str) -> None:
    typer.echo(text, err=True)


def device_of(given: str) -> str:
    """The device that --device names; by default a GPU where there is one. Raises ValueError for none of torch's."""
    if not given:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(given)
    except RuntimeError:
        raise ValueError(f"--device must be a device of torch, as cpu or cuda:1, got {given!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {given}: torch {torch.__version__} sees no GPU here; give --device cpu")
    return str(device)


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raises OSError, before hours of work, where nothing can be written or something would be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give --output a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{folder} is not empty: --overwrite writes into it all the same, or give another --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".diffusers-dq"
    try:
        probe.touch()
    finally:
        probe.unlink(missing_ok=True)
