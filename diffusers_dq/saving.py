# SPDX-License-Identifier: Apache-2.0
"""`save_pretrained` of a quantized model: each file is whole, and a folder that was empty is filled all at once."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers_dq.files import replacing, to_disk, workplace

_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.)")
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?P<variant>\..+)?\.json")


def save_whole(save: Callable[..., Any], save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """`save(folder, *args, **kwargs)`, diffusers' own, beside `save_directory`; then the files take their places.

    Files of other models and variants stay; shards and indexes that this save has not written go, as they would be
    read with it. A process killed while files take their places leaves some of each save: every one whole, and the
    checksum in config.json notices. Raises OSError where nothing can be written; what was there before is there still.
    """
    place = Path(save_directory)
    place.parent.mkdir(parents=True, exist_ok=True)
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", place.absolute().name)
    if not place.is_dir() or not any(place.iterdir()):
        with replacing(place) as folder:
            save(str(folder), *args, **kwargs)
            _all_to_disk(folder)
        return
    with workplace(place) as folder:
        save(str(folder / place.name), *args, **kwargs)
        _all_to_disk(folder / place.name)
        written = sorted((folder / place.name).iterdir())
        for file in written:
            os.replace(file, place / file.name)
    families = {family(file.name) for file in written}
    for file in place.iterdir():
        if family(file.name) in families and file.name not in {new.name for new in written}:
            file.unlink()
    to_disk(place)


def _all_to_disk(folder: Path) -> None:
    for file in folder.iterdir():
        to_disk(file)


def family(name: str) -> str:
    """Of a shard or an index, the file of weights that it stands for."""
    index = _INDEX.fullmatch(name)
    return f"{index['stem']}{index['variant'] or ''}.safetensors" if index else _SHARD.sub("", name)
