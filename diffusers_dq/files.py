# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and that notice what has happened to them since they were written."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SEAL = "checksum"  # in the result of config.json's quantization_config
_KEY = "diffusers_dq"  # of what is ours in a safetensors file's metadata
_CHECKSUM = "diffusers_dq_checksum"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to; the file becomes `target` once it is whole and on disk, and else leaves target as it was.

    It lies in a folder of its own beside target, `<name>.unfinished`, which a process that is killed leaves behind and
    the next one that writes removes: safetensors (0.8) writes to a name that nobody would know to remove.
    Raises OSError, naming target, where it cannot be written, as on a full disk.
    """
    folder = target.with_name(f"{target.name}.unfinished")
    try:
        _remove(folder)
        folder.mkdir()
        unfinished = folder / target.name
        yield unfinished
        _to_disk(unfinished)
        os.replace(unfinished, target)
        _to_disk(target.absolute().parent)
    except (SafetensorError, OSError) as error:
        raise OSError(f"cannot write {target}: {error}. What was there before is there still") from error
    finally:
        _remove(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Of a folder, its names: only POSIX systems open one."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checksum:
    """CRC-32 of tensors with their names, dtypes and shapes, in any order: some 7 GB a second on an AMD EPYC."""

    def __init__(self) -> None:
        self.of_tensors: dict[str, str] = {}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Checksum":
        checksum = cls()
        for name, tensor in tensors.items():
            checksum.add(name, tensor)
        return checksum

    def add(self, name: str, tensor: Tensor) -> None:
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.of_tensors[name] = f"{tensor.dtype} {tuple(tensor.shape)} {zlib.crc32(values.numpy().data):08x}"

    def with_text(self, text: str) -> str:
        """Of the tensors and a text, 8 hexadecimal digits."""
        return f"{zlib.crc32(json.dumps([text, sorted(self.of_tensors.items())]).encode()):08x}"


def write_tensors(target: Path, tensors: Mapping[str, Tensor], header: Any) -> None:
    """One safetensors file.   header: JSON-able.   Raises OSError as `replacing` does."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header)
    metadata = {_KEY: text, _CHECKSUM: Checksum.of(contiguous).with_text(text)}
    with replacing(target) as unfinished:
        save_file(contiguous, unfinished, metadata=metadata)


def read_tensors(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Tensor]]:
    """(header, tensors) of what `write_tensors` wrote, the tensors mapped; the header is None in another's file.

    Raises ValueError for a file that is damaged or cut short: its checksum notices any change. One without a checksum,
    as earlier versions wrote, is not compared.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
        text = metadata.get(_KEY, "null")
        header = json.loads(text)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error})") from error
    known = metadata.get(_CHECKSUM)
    if known is not None and known != Checksum.of(tensors).with_text(text):
        raise ValueError(f"{path} is damaged: its contents are not what was written, by their checksum")
    return header, tensors


def sealed(result: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The result in config.json with the checksum of all else in it and of the tensors in the files of weights.

    diffusers writes config.json, the files of weights and their index one after the other, over those that were there;
    a process killed in between leaves parts of two models, which may fit each other.
    """
    return {**result, SEAL: _seal(result, Checksum.of(tensors))}


def check_seal(result: Mapping[str, Any], tensors: Checksum) -> None:
    """Raises ValueError where the tensors that were read are not those that `sealed` saw. A result without a checksum,
    as earlier versions wrote, is not compared."""
    if SEAL in result and result[SEAL] != _seal(result, tensors):
        raise ValueError(
            "config.json and the weights were not saved together, by the checksum in config.json: saving was"
            " interrupted, or a file was exchanged, damaged or edited. Save the model again, or load the original"
        )


def _seal(result: Mapping[str, Any], tensors: Checksum) -> str:
    return tensors.with_text(json.dumps({key: result[key] for key in result if key != SEAL}, sort_keys=True))
