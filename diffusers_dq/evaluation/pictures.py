# SPDX-License-Identifier: Apache-2.0
"""Sets of pictures on disk, read batch by batch: uint8 [b, H, W, 3], all of one size."""

import hashlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffusers_dq.files import read_json

Pixels = npt.NDArray[np.uint8]

SETTINGS = "settings.json"
PICTURES = "pictures"  # the folder in the output of `diffusers-dq evaluate`
# what Python's zipfile raises of a damaged archive, or of one packed in ways that numpy never does
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
_PICTURE_FILES = {".png", ".jpg", ".jpeg"}
_MOST_PICTURES = 10**8


@dataclass(frozen=True)
class PictureSet:
    """place: the folder or file that holds it.   files: in the order of the pictures.
    settings: how it was sampled, {} for pictures from elsewhere.
    """

    place: Path
    files: tuple[Path, ...]
    count: int
    size: tuple[int, int]
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.count

    @classmethod
    def open(cls, place: str | os.PathLike[str]) -> "PictureSet":
        """A folder that `sample` or `diffusers-dq evaluate` wrote, a folder of PNG or JPEG files (subfolders too), or
        an .npz file whose arr_0 is uint8 [n, H, W, 3], as the reference batches of ADM's evaluation suite.

        Raises ValueError for anything else, an unfinished set, pictures of several sizes.
        """
        place = Path(place)
        sampled = sampled_folder(place)
        if sampled is not None:
            return cls._sampled(sampled)
        if place.is_dir():
            return cls._folder(place)
        if place.suffix == ".npz" and place.is_file():
            count, *size = _shape(place)
            return cls(place, (place,), count, (size[0], size[1]))
        raise ValueError(
            f"{place} holds no pictures: give a folder of PNG or JPEG files, a folder that `diffusers-dq evaluate`"
            " wrote, or an .npz file with uint8 pictures [n, H, W, 3] as arr_0"
        )

    @classmethod
    def _sampled(cls, place: Path) -> "PictureSet":
        settings = read_json(place / SETTINGS)
        sizes: list[Any] = [settings.get(key) if isinstance(settings, dict) else None for key in ("images", "batch")]
        if not all(type(size) is int and 0 < size <= _MOST_PICTURES for size in sizes):
            raise ValueError(f"{place / SETTINGS} does not say how many pictures there are; sample them again")
        images, batch = sizes
        files = tuple(batch_file(place, first) for first in range(0, images, batch))
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ValueError(
                f"{place} is not finished: {len(missing)} of {len(files)} batches are missing, {missing[0]} first; run"
                " the command that began it again"
            )
        _, height, width, _ = _shape(files[0])
        return cls(place, files, images, (height, width), settings)

    @classmethod
    def _folder(cls, place: Path) -> "PictureSet":
        files = tuple(sorted(file for file in place.rglob("*") if file.suffix.lower() in _PICTURE_FILES))
        if not files:
            raise ValueError(f"{place} holds no .png, .jpg or .jpeg file")
        return cls(place, files, len(files), _load(files[0]).shape[:2])

    def batches(self, batch: int) -> Iterator[Pixels]:
        """Of `batch` pictures, the last of what is left. At most `batch` pictures and a file are in memory."""
        held: list[Pixels] = []
        for file in self.files:
            held.append(self._checked(file))
            while sum(map(len, held)) >= batch:
                pixels = np.concatenate(held)
                yield pixels[:batch]
                held = [pixels[batch:]]
        rest = np.concatenate(held)
        if len(rest):
            yield rest

    def first(self, n: int) -> Pixels:
        """[min(n, count), H, W, 3]"""
        return next(self.batches(n))

    def stamp(self) -> str:
        """Changes when a file is added, removed or written again."""
        entries = [(str(file.relative_to(self.place.parent)), file.stat()) for file in self.files]
        facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in entries]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def _checked(self, file: Path) -> Pixels:
        pixels = _pixels(file)
        if pixels.shape[1:3] != self.size:
            raise ValueError(f"{file} is of {by(pixels.shape[1:3])} pixels, the first picture of {by(self.size)}")
        return pixels


def sampled_folder(place: Path) -> Path | None:
    """Where the pictures are, if `place` is a set that was sampled here or the output of `diffusers-dq evaluate`."""
    return next((folder for folder in (place, place / PICTURES) if (folder / SETTINGS).is_file()), None)


def batch_file(folder: Path, first: int) -> Path:
    """Of the batch that begins with picture `first`."""
    return folder / f"pictures-{first:08d}.npz"


def check_one_size(a: PictureSet, b: PictureSet) -> None:
    if a.size != b.size:
        raise ValueError(
            f"{a.place} holds pictures of {by(a.size)} pixels and {b.place} of {by(b.size)}; both must be of one size"
        )


def by(size: tuple[int, ...]) -> str:
    """As 32 x 32."""
    return " x ".join(map(str, size))


def _pixels(file: Path) -> Pixels:
    """[b, H, W, 3]"""
    if file.suffix != ".npz":
        return _load(file)[None]
    _shape(file)
    try:
        with np.load(file, allow_pickle=False) as content:
            pixels: Pixels = content["arr_0"]
            return pixels
    except (ValueError, OSError, EOFError, *DAMAGED_ZIP) as error:
        raise ValueError(f"{file} is damaged ({error}); write or sample it again") from None


def _load(file: Path) -> Pixels:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is no picture that can be read ({error}); remove or replace it") from None


def _shape(file: Path) -> tuple[int, ...]:
    """Of arr_0, without reading the pictures. Raises ValueError for a file that is not as expected."""
    expected = "expected an .npz file whose arr_0 is uint8 [n, H, W, 3]"
    try:
        with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as array:
            version = np.lib.format.read_magic(array)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(array)
            room = archive.getinfo("arr_0.npy").file_size - array.tell()
    except (KeyError, ValueError, TypeError, OverflowError, OSError, EOFError, *DAMAGED_ZIP) as error:
        raise ValueError(f"{file} cannot be read ({error}); {expected}") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise ValueError(f"arr_0 of {file} is {dtype} {list(shape)}; {expected}")
    if any(type(size) is not int or size < 1 for size in shape) or math.prod(shape) != room:
        raise ValueError(f"{file} is damaged: arr_0 is said to be {list(shape)}, in {room} bytes; {expected}")
    return tuple(shape)
