# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a published Open-Sora checkpoint are, and how they are read; no code in a file is run."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

_PICKLES = {".pth", ".pt", ".bin", ".ckpt"}
_HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]
_LARGEST = 1 << 31  # of a number in config.json


def locate(source: str | os.PathLike[str], filename: str | None, revision: str | None) -> Path:
    """A file, or a folder with config.json."""
    from huggingface_hub import hf_hub_download, snapshot_download

    path = Path(source)
    if not path.exists():
        repository = str(source)
        if repository.count("/") != 1 or repository.startswith((".", "/", "~")) or path.suffix in _PICKLES:
            raise ValueError(f"there is no file or folder {source}, and it is no name on the Hub, owner/name")
        if filename is not None:
            return Path(hf_hub_download(repository, filename, revision=revision))
        path = Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES))
    path = path / filename if filename is not None else path
    if not path.exists():
        raise ValueError(f"{path.parent} holds no {path.name}; expected the name of one of its files")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no config.json; name one of its files by filename=...")
    return path


def read(path: Path) -> Mapping[str, Tensor]:
    """Of a file, or of the files of a folder that are the model. Raises ValueError where two hold the same tensor."""
    if not path.is_dir():
        return _read_file(path)
    tensors: dict[str, Tensor] = {}
    for file in _files_of(path):
        content = _read_file(file)
        twice = sorted(tensors.keys() & content.keys())
        if twice:
            raise ValueError(
                f"{file} holds tensors that another file of the index holds too ({', '.join(twice[:5])}), so one of"
                " them is not of this model; name the file to read by filename=..."
            )
        tensors |= content
    return tensors


def _files_of(folder: Path) -> list[Path]:
    """model.safetensors, the files that an index names, or the only file that there is."""
    found = sorted(folder.glob("*.safetensors"))
    if folder / "model.safetensors" in found:
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        absent = [name for name in names if folder / name not in found]
        if not names or absent:
            raise ValueError(f"{index} must name files of its folder as weight_map; absent: {', '.join(absent)}")
        return [folder / name for name in names]
    if not found:
        raise ValueError(f"{folder} holds no .safetensors file; name another of its files by filename=...")
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds {', '.join(file.name for file in found)}, and neither a model.safetensors nor"
            f" {index.name} says which of them are the model; name one by filename=..."
        )
    return found


def _read_file(file: Path) -> Mapping[str, Tensor]:
    if file.suffix != ".safetensors" and file.suffix not in _PICKLES:
        known = ", ".join(sorted({*_PICKLES, ".safetensors"}))
        raise ValueError(f"{file} is no checkpoint that can be read: expected one of {known}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        return content
    except (OSError, MemoryError):
        raise
    except UnpicklingError as error:
        raise ValueError(
            f"{file} is damaged or pickles more than tensors, and code from a file is never run here. If you trust the"
            f" file, convert it to .safetensors elsewhere ({first_line(error)})"
        ) from None
    except Exception as error:  # whatever the bytes of a damaged file make the readers stumble over
        raise ValueError(f"{file} is damaged, or cut short; download it again ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: expected a JSON object, found {type(content).__name__}")
    return content


def published_config(file: Path) -> dict[str, Any]:
    """Of STDiT3's config.json, what its tensors do not say; keys that only training reads are passed over."""
    published = _read_json(file)
    if published.get("qk_norm_legacy"):
        raise ValueError(f"{file} sets qk_norm_legacy: rotary positions before the norm, which is not supported")
    names = {"num_heads": "num_attention_heads", "input_sq_size": "sample_size"}
    for theirs in names.keys() & published.keys():
        if type(published[theirs]) is not int or not 0 < published[theirs] < _LARGEST:
            raise ValueError(
                f"{file} is damaged: {theirs} is {str(published[theirs])[:50]}, expected a positive integer"
            )
    return {ours: published[theirs] for theirs, ours in names.items() if theirs in published}
