# SPDX-License-Identifier: Apache-2.0
"""`dq.push_to_hub`: a quantized model with a card that says what it is, in one commit."""

import fnmatch
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError

from diffusers_dq.cards import GRID, check_publishable, make_card, read_card
from diffusers_dq.denoise import denoiser
from diffusers_dq.evaluation import Comparison
from diffusers_dq.repository import explained, fetch, open_repository, send, split_repository
from diffusers_dq.statistics import FILENAME, Statistics

logger = logging.getLogger(__name__)

README = "README.md"
_WEIGHTS = "diffusion_pytorch_model*"
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")


def push_to_hub(
    pipe_or_transformer: Any,
    repo_id: str,
    *,
    comparison: Comparison | None = None,
    statistics: Statistics | Mapping[str, Statistics] | None = None,
    call: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload a quantized pipeline, or a transformer alone, with a model card; `from_pretrained(repo_id)` loads it.

    All goes up in one commit: until it is whole nothing can be seen, and after an interruption the same call completes
    it without uploading whole files again. Weights of an earlier push that are in the way are removed in that commit.

    comparison: of `dq.compare`; its figures go into the card, its files into `comparison/`.
    statistics: of `dq.calibrate`; described in the card and uploaded as `statistics.safetensors`, which others use
        with `DQConfig(statistics=repo_id)`. The file names the calls' arguments, prompts among them. Of a pipeline
        with two denoisers {"transformer": ..., "transformer_2": ...}, as `statistics-<name>.safetensors`.
    call: keyword arguments of the card's example; by default a prompt, or the first class.
    base_model, license: of the original, where its id is not what it was loaded from, or its card says no licence;
        what is neither given nor found is left out of the card and logged.
    metadata: more for the card's YAML block (license_name, license_link, language, tags, pipeline_tag).
    private: a repository that is made now; None is the owner's default.   revision: a branch, made if it is not there.
    subfolder: of a transformer alone; diffusers finds pipelines at the top only.
    token: else HF_TOKEN or that of `hf auth login`.   create_pr: propose it instead, as a pull request.

    A README.md that is there keeps its text: see `Card.render`. The card is always at the top, where the Hub shows it.

    Raises, before any network, ValueError for what cannot be published (`check_publishable`, `make_card`); where a
    private repository is asked for and a public one is there; and as `repository.explained` says.
    """
    parts = check_publishable(pipe_or_transformer)
    is_pipeline = isinstance(pipe_or_transformer, DiffusionPipeline)
    if is_pipeline and subfolder is not None:
        raise ValueError(
            f"subfolder={subfolder!r} is for a transformer alone: diffusers loads pipelines from the top of a"
            " repository; give another revision or another repository"
        )
    subfolder = (subfolder or "").strip("/")
    of_parts = _by_part(statistics, list(parts))
    given = {"base_model": base_model, "license": license}
    given = {key: value for key, value in given.items() if value is not None} | dict(metadata or {})
    about: dict[str, Any] = dict(
        comparison=comparison, statistics=of_parts, call=call, metadata=given, subfolder=subfolder
    )
    make_card(pipe_or_transformer, repo_id, **about)  # what is wrong with it is said before anything is uploaded

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = folder / subfolder
        saved = pipe_or_transformer if is_pipeline else denoiser(pipe_or_transformer)
        saved.save_pretrained(model)
        if comparison is not None:
            comparison.save((model / GRID).parent)
        for name, of_part in of_parts.items():
            of_part.save(model / (FILENAME if len(of_parts) == 1 else f"statistics-{name}.safetensors"))
        places = {name: model / name if is_pipeline else model for name in parts}
        sizes = {name: sum(file.stat().st_size for file in p.glob("*.safetensors")) for name, p in places.items()}
        if not is_pipeline:
            sizes = {"transformer": sum(file.stat().st_size for file in model.glob(f"{_WEIGHTS}.safetensors"))}

        base = original(pipe_or_transformer, base_model, token)
        repo_id, parent = open_repository(api, repo_id, private=private, revision=revision)
        card = make_card(pipe_or_transformer, repo_id, base=base, file_bytes=sizes, **about)
        for key in ("base_model", "license"):
            if key not in card.metadata:
                logger.warning("the card of %s says no %s: none is known. Give %s=...", repo_id, key, key)
        with explained("upload", repo_id, revision):
            there = api.list_repo_files(repo_id, revision=parent)
        existing = None
        if README in there:
            existing = fetch(repo_id, README, revision=parent, token=token).read_text(encoding="utf-8-sig")
        (folder / README).write_text(card.render(existing), encoding="utf-8")
        files = {str(file.relative_to(folder).as_posix()): file for file in folder.rglob("*") if file.is_file()}
        stale = [f"{place.relative_to(folder).as_posix()}/{_WEIGHTS}".removeprefix("./") for place in places.values()]
        return send(
            api,
            repo_id,
            files,
            message=commit_message or f"Upload {card.pipeline or card.parts[0]['class']}, quantized by diffusers_dq",
            revision=revision,
            parent=parent,
            create_pr=create_pr,
            delete=[p for p in there if p not in files and any(_matches(p, glob) for glob in stale)],
        )


def _matches(path: str, glob: str) -> bool:
    """In the same folder."""
    return path.count("/") == glob.count("/") and fnmatch.fnmatchcase(path, glob)


def _by_part(statistics: Any, parts: list[str]) -> dict[str, Statistics]:
    if isinstance(statistics, Statistics):
        if len(parts) > 1:
            raise ValueError(f"{' and '.join(parts)} have statistics of their own: give a dict of them by name")
        return {parts[0]: statistics}
    of_parts = dict(statistics or {})
    for name, of_part in of_parts.items():
        if name not in parts or not isinstance(of_part, Statistics):
            raise ValueError(f"statistics must be dq.Statistics by name of {parts}, got {name!r}: {of_part!r}")
    return of_parts


def original(
    pipe_or_transformer: Any, base_model: str | None = None, token: str | bool | None = None
) -> dict[str, Any]:
    """Metadata of the card of the model that this one was made of, with "base_model" where its id on the Hub is known.

    base_model: its id; None looks where the model was loaded from: a folder's own card, or a repository that the Hub
        confirms. A quantized model's card leads to its original. What cannot be found is not there.
    """
    source = base_model or _source(pipe_or_transformer)
    if not source:
        return {}
    folder = Path(source)
    if base_model is None and folder.is_dir():
        top = folder.parent if (folder.parent / "model_index.json").is_file() else folder
        found = _metadata_in(top / README) if (top / README).is_file() else {}
        known = found.get("base_model") if found.get("base_model_relation") == "quantized" else None
        return {key: value for key, value in found.items() if key != "base_model"} | _id(known)
    repository = split_repository(source)
    if repository is None:
        return _id(base_model)
    try:
        card = fetch(repository[0], README, revision=repository[1], token=token)
    except (FileNotFoundError, PermissionError, ConnectionError) as error:
        exists = isinstance(error.__cause__, RemoteEntryNotFoundError | GatedRepoError)
        logger.warning("nothing was learned of the original's licence: %s", error)
        return _id(base_model or (repository[0] if exists else None))
    found = _metadata_in(card)
    if base_model is None and found.get("base_model_relation") == "quantized":
        return found
    if found.get("license_link") and "://" not in str(found["license_link"]):  # beside its card, not beside ours
        found["license_link"] = f"https://huggingface.co/{repository[0]}/blob/main/{found['license_link']}"
    return found | _id(repository[0])


def _id(base_model: str | None) -> dict[str, Any]:
    return {} if base_model is None else {"base_model": base_model}


def _source(pipe_or_transformer: Any) -> str | None:
    """Where it was loaded from, a folder or an id; diffusers notes it."""
    name = getattr(pipe_or_transformer, "config", {}).get("_name_or_path")
    if not isinstance(name, str | os.PathLike) or not str(name):
        return None
    name = os.fspath(name)
    in_cache = _SNAPSHOT.search(Path(name).as_posix() + "/")
    return f"{in_cache[1]}/{in_cache[2]}" if in_cache else name


def _metadata_in(card: Path) -> dict[str, Any]:
    try:
        return dict(read_card(card.read_text(encoding="utf-8-sig")).data.to_dict())
    except ValueError as error:
        logger.warning("no licence was taken from %s: %s", card, error)
        return {}


__all__ = ["original", "push_to_hub"]
