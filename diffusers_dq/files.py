# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and that notice what has happened to them since they were written."""

import json
import math
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: what killed writers left stays
    fcntl = None  # type: ignore[assignment]

SEAL = "checksum"  # in the result of config.json's quantization_config
_KEY = "diffusers_dq"  # of what is ours in a safetensors file's metadata
_CHECKSUM = re.compile("[0-9a-f]{8}")  # before it
_UNFINISHED, _LOCK = ".unfinished", "lock"  # a folder of `replacing`, and what is in it


class OfAnotherRun(ValueError):
    """A checkpoint that other settings or another model wrote: there is nothing to go on from."""


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to; the file becomes `target` once it is whole and on disk, and else leaves target as it was.

    It lies in a hidden folder of this writer's own beside target, so that several may write at once and the last one
    stays; what killed writers left is removed. Where target is a link, the file that it leads to is replaced.
    Raises OSError, naming target, where it cannot be written, as on a full disk.
    """
    place = Path(os.path.realpath(target))
    if place.exists() and not place.is_file():
        raise OSError(f"cannot write {target}: it is a folder, a device or a pipe; give the name of a file")
    try:
        with workplace(place) as folder:
            unfinished = folder / place.name
            yield unfinished
            if place.exists():
                shutil.copymode(place, unfinished)
            to_disk(unfinished)
            os.replace(unfinished, place)
    except (SafetensorError, OSError) as error:
        raise OSError(f"cannot write {target}: {error}. What was there before is there still") from error
    to_disk(place.parent)


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` for this writer alone, removed with what is left in it; those of writers that
    were killed are removed too. A folder, since safetensors (0.8) writes to a name beside the one it is given.

    Its lock tells that the writer lives: the system lets go of it however a process ends.
    """
    start = f".{target.name[:50]}."
    _remove_abandoned(target.parent, start)
    folder = Path(tempfile.mkdtemp(_UNFINISHED, start, target.parent))
    try:
        with (folder / "new").open("w") as lock:
            if _held(lock):
                (folder / "new").rename(folder / _LOCK)  # none sees it before it is held
            else:
                (folder / "new").unlink()
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _held(lock: IO[str]) -> bool:
    """False where the file system knows no locks, as some network ones: what killed writers left there stays."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _remove_abandoned(parent: Path, start: str) -> None:
    for name in os.listdir(parent) if fcntl is not None else ():
        if name.startswith(start) and name.endswith(_UNFINISHED):
            with suppress(OSError):  # held, or no folder of `workplace`
                lock = os.open(parent / name / _LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(parent / name, ignore_errors=True)
                finally:
                    os.close(lock)


def to_disk(path: Path) -> None:
    """Of a folder, its names, where the file system can promise them."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():
            raise


def check_writable(path: str | os.PathLike[str]) -> Path:
    """The path. Raises OSError, before hours of work, where no file can be written there."""
    target = Path(path)
    parent = target.absolute().parent
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; give the path of a file")
    if not parent.is_dir():
        raise FileNotFoundError(f"there is no folder {parent} to write {target.name} to; make it first")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"the folder {parent} cannot be written to; choose another")
    return target


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """`write(file)`, all or nothing. Makes the folder.   Raises OSError as `replacing` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        write(file)


def write_json(path: Path, content: Any) -> None:
    """Strict JSON, as `strict` makes it, all or nothing."""
    text = json.dumps(strict(content), indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def strict(content: Any) -> Any:
    """What strict JSON can hold: numbers that are not finite become "inf", "-inf" or "nan", which `float` reads."""
    if isinstance(content, Mapping):
        return {str(key): strict(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [strict(value) for value in content]
    if isinstance(content, Path) or (isinstance(content, float) and not math.isfinite(content)):
        return str(content)
    return content


def read_json(path: str | os.PathLike[str]) -> Any:
    """Raises OSError, and ValueError, with the path, for a file that is not JSON: damaged, or nested beyond reason."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None


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
    """One safetensors file.   header: JSON-able.   tensors: those that share memory are written each.

    Raises OSError as `replacing` does.
    """
    contiguous: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        shared = tensor.untyped_storage().data_ptr() in places
        contiguous[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        places.add(contiguous[name].untyped_storage().data_ptr())
    text = json.dumps(header)
    # in one entry: safetensors writes several in any order, and the same statistics must be the same file
    metadata = {_KEY: f"{Checksum.of(contiguous).with_text(text)} {text}"}
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
        known, text = _parts(metadata.get(_KEY, "null"))
        header = json.loads(text)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error})") from error
    if known is not None and known != Checksum.of(tensors).with_text(text):
        raise ValueError(f"{path} is damaged: its contents are not what was written, by their checksum")
    return header, tensors


def _parts(entry: str) -> tuple[str | None, str]:
    """(checksum, header); without a checksum as in an earlier version's or another's file."""
    known, space, text = entry.partition(" ")
    return (known, text) if space and _CHECKSUM.fullmatch(known) else (None, entry)


def sealed(result: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The result in config.json with the checksum of all else in it and of the tensors in the files of weights.

    diffusers writes config.json, the files of weights and their index one after the other, over those that were there;
    a process killed in between leaves parts of two models, which may fit each other.
    """
    return {**result, SEAL: _seal(result, Checksum.of(tensors))}


def check_seal(result: Mapping[str, Any], tensors: Checksum) -> None:
    """Raises ValueError where the tensors that were read are not those that `sealed` saw. A result without a checksum,
    as earlier versions wrote, is not compared; nor are the model's own fields of config.json, which diffusers extends.
    """
    if SEAL in result and result[SEAL] != _seal(result, tensors):
        raise ValueError(
            "config.json and the weights were not saved together, by the checksum in config.json: saving was"
            " interrupted, or a file was exchanged, damaged or edited. Save the model again, or load the original"
        )


def _seal(result: Mapping[str, Any], tensors: Checksum) -> str:
    return tensors.with_text(json.dumps({key: result[key] for key in result if key != SEAL}, sort_keys=True))
