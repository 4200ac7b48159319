# SPDX-License-Identifier: Apache-2.0
"""Results on stdout, for people or for machines; all else on stderr."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import typer

from diffusers_dq.files import strict


def emit(content: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """One JSON object, as `strict` makes it, or the text."""
    typer.echo(json.dumps(strict(content), indent=1, allow_nan=False) if as_json else text)


def note(text: str) -> None:
    typer.echo(text, err=True)


def device_of(given: str) -> str:
    """The device that --device names; by default a GPU where there is one. Raises BadParameter for none of torch's."""
    if not given:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(given)
    except RuntimeError:
        raise typer.BadParameter(f"--device must be a device of torch, as cpu or cuda:1, got {given!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device {given}: torch {torch.__version__} sees no GPU here; give --device cpu")
    return str(device)


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raises OSError, before hours of work, where nothing can be written or something would be overwritten. Makes
    nothing."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give --output a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{folder} is not empty: --overwrite writes into it all the same, or give another --output"
        )
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    with tempfile.TemporaryFile(dir=there):
        pass
