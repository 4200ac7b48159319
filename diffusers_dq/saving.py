# SPDX-License-Identifier: Apache-2.0
"""Folders of models: each file is whole, and a folder that was not there appears with all that belongs in it."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from diffusers_dq.files import to_disk, workplace

_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.)")
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?P<variant>\..+)?\.json")


def save_whole(save: Callable[[str], object], save_directory: str | os.PathLike[str]) -> None:
    """`fill` with what a model's `save(folder)` writes.

    Files of other models and variants stay; shards and indexes that this save has not written go, as they would be
    read with it. A process killed while files take their places leaves some of each save: every one whole, and the
    checksum in config.json notices.
    """
    place = Path(os.path.realpath(save_directory))
    written = fill(place, save)
    families = {family(name) for name in written}
    for file in place.iterdir():
        if file.is_file() and family(file.name) in families and file.name not in written:
            file.unlink(missing_ok=True)


def fill(folder: str | os.PathLike[str], save: Callable[[str], object]) -> set[str]:
    """`save(elsewhere)`, on the same disk; then what it has written takes its place in `folder`, over what is there.

    A folder that is not there is renamed as a whole. Returns the names of what was written, folders among them.
    Raises NotADirectoryError for a file, OSError where nothing can be written; what was there before is there still.
    """
    place = Path(os.path.realpath(folder))
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give the path of a folder")
    place.parent.mkdir(parents=True, exist_ok=True)
    with workplace(place / "saved" if place.is_dir() else place) as beside:
        whole = beside / "whole"
        save(str(whole))
        for path in whole.rglob("*"):
            to_disk(path)
        names = {path.name for path in whole.iterdir()}
        if not _renamed(whole, place):
            place.mkdir(exist_ok=True)
            for name in sorted(names):
                if (place / name).is_file():
                    shutil.copymode(place / name, whole / name)
                os.replace(whole / name, place / name)
    to_disk(place)
    return names


def _renamed(whole: Path, place: Path) -> bool:
    """False where a folder is there already, also one that another process has just made."""
    if place.exists():
        return False
    try:
        whole.rename(place)
    except OSError:
        if not place.is_dir():
            raise
        return False
    return True


def family(name: str) -> str:
    """Of a shard or an index, the file of weights that it stands for."""
    index = _INDEX.fullmatch(name)
    return f"{index['stem']}{index['variant'] or ''}.safetensors" if index else _SHARD.sub("", name)
