# SPDX-License-Identifier: Apache-2.0
"""Code blocks of Markdown pages, and small stand-ins for what they load from the Hub, push to it or put on a GPU.

A block that cannot run here has the reason in a comment on the line before it, `<!-- not executed: reason -->`.
"""

import re
import runpy
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from support import tiny_pipeline

import diffusers_dq as dq

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (
        ROOT / "README.md",
        ROOT / "kernels" / "README.md",
        ROOT / "examples" / "dit-cifar10" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}
# What a name of the Hub stands for: the same kind of pipeline with tiny random weights.
STAND_INS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "facebook/DiT-XL-2-256": lambda: tiny_pipeline(sample_size=16)
}
# The same search over fewer candidates: 550 runs of a pipeline by default.
SMALLER = {"search_group_sizes": dict(population=2, parents=1, generations=1)}
_FENCE = re.compile(r"(?P<fence>`{3,})(?P<language>\w*)[^`]*")
_INCLUDED = re.compile(r"<!-- include: (?P<path>.+?) -->")  # docs/hooks.py
_NOT_EXECUTED = re.compile(r"<!-- not executed: (?P<reason>.+) -->")


@dataclass(frozen=True)
class Block:
    """line: of its first line of code, from 1.   reason: why it is not executed, "" if it is.
    source: the file it includes instead of code of its own, or the page."""

    page: str
    line: int
    language: str
    code: str
    reason: str
    source: Path

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """Raises ValueError for a fence that is not closed."""
    lines = PAGES[page].read_text().splitlines()
    found, i = [], 0
    while i < len(lines):
        fence = _FENCE.fullmatch(lines[i].strip())
        if fence is None:
            i += 1
            continue
        end = next((j for j in range(i + 1, len(lines)) if lines[j].strip() == fence["fence"]), None)
        if end is None:
            raise ValueError(f"{page}:{i + 1}: the code block is not closed")
        mark = _NOT_EXECUTED.fullmatch(lines[i - 1].strip()) if i else None
        code, source = "\n".join(lines[i + 1 : end]), PAGES[page]
        included = _INCLUDED.fullmatch(code.strip())
        if included is not None:
            source = ROOT / included["path"]
            code = source.read_text()
        found.append(Block(page, i + 2, fence["language"], code, mark["reason"] if mark else "", source))
        i = end + 1
    return found


def text_pipeline() -> dict[str, Any]:
    """PixArt with a tokenizer of letters and an encoder, as its example builds them, for prompts of any words."""
    example = runpy.run_path(str(ROOT / "examples" / "pixart.py"), run_name="pixart")
    pipe = example["full_precision"](tiny=True)
    size = dict(height=16, width=16, use_resolution_binning=False, max_sequence_length=16, num_inference_steps=2)
    call = type(pipe).__call__
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {"__call__": partialmethod(call, **size)})
    pipe.set_progress_bar_config(disable=True)
    return {"pipe": pipe}


def full_precision() -> dict[str, Any]:
    return {"pipe": tiny_pipeline()}


# What a block that begins a new story expects to find, by page and by a piece of its code.
BEFORE: Mapping[tuple[str, str], Callable[[], dict[str, Any]]] = {
    ("README.md", "dq.cache_text(pipe)"): text_pipeline,
    ("README.md", "dq.search_group_sizes("): full_precision,
}


def expected(block: Block) -> dict[str, Any]:
    """Names that a block expects besides those of the blocks before it."""
    return {
        name: value
        for (page, code), make in BEFORE.items()
        if page == block.page and code in block.code
        for name, value in make().items()
    }


@contextmanager
def stand_ins(folder: Path) -> Iterator[None]:
    """Within: names of the Hub load tiny pipelines saved in `folder`, or what was pushed under them, "cuda" is the CPU
    where there is none, searches are small, and nothing that is registered stays so."""
    from diffusers_dq.methods import METHODS
    from diffusers_dq.specs import SPECS

    load, move = DiffusionPipeline.from_pretrained.__func__, DiffusionPipeline.to

    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        if str(name) in STAND_INS:
            saved = folder / str(name).replace("/", "--")
            if not saved.exists():
                STAND_INS[name]().save_pretrained(saved)
            name = saved
        elif (pushed := _place(folder, str(name), kwargs.get("revision"))).exists():
            name = pushed
            kwargs.pop("revision", None)
        pipe = load(cls, name, *args, **kwargs)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args == ("cuda",) and not torch.cuda.is_available():
            return self
        return move(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
        patch.setattr(DiffusionPipeline, "to", to)
        _hub_in(folder, patch)
        for name, arguments in SMALLER.items():
            patch.setattr(dq, name, partial(getattr(dq, name), progress=False, **arguments))
        for registry in (METHODS, SPECS):
            patch.setattr(registry, "_entries", dict(registry._entries))
        yield


def _place(folder: Path, repo_id: str, revision: str | None) -> Path:
    return folder / "hub" / repo_id / (revision or "main")


def _hub_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """In place of the Hub's client: repositories are folders, a folder for each branch. What is uploaded, and the
    card, is made by the code itself."""
    from huggingface_hub import HfApi

    from diffusers_dq import hub, statistics, statistics_file

    def fetch(repo_id: str, filename: str, *, revision: str | None = None, token: Any = None) -> Path:
        file = _place(folder, repo_id, revision) / filename
        if not file.exists():
            raise FileNotFoundError(f"no {filename} was pushed to {repo_id} at {revision or 'main'}")
        return file

    def send(api: Any, repo_id: str, files: Mapping[str, Path], *, revision: str | None, **about: Any) -> Any:
        for path, file in files.items():
            target = _place(folder, repo_id, revision) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}", pr_url=None)

    for module in (hub, statistics_file):
        patch.setattr(module, "fetch", fetch)
    for module in (hub, statistics):
        patch.setattr(module, "send", send)
        patch.setattr(module, "open_repository", lambda api, repo_id, *, private, revision: (repo_id, revision))
    patch.setattr(HfApi, "list_repo_files", lambda self, repo_id, *, revision: [])
