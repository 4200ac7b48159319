# SPDX-License-Identifier: Apache-2.0
"""`dq.push_to_hub`: a quantized model with a card that says what it is, in one commit."""

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, HfApi, constants
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError

from diffusers_dq.card_facts import check_publishable
from diffusers_dq.cards import GRID, Card, make_card, read_card
from diffusers_dq.config import DQMethod
from diffusers_dq.denoise import DENOISERS, denoiser
from diffusers_dq.evaluation import Comparison
from diffusers_dq.files import workplace
from diffusers_dq.repository import (
    cached,
    explained,
    fetch,
    named_on_hub,
    open_repository,
    send,
    split_repository,
)
from diffusers_dq.saving import family
from diffusers_dq.statistics import Statistics
from diffusers_dq.statistics_file import FILENAME

logger = logging.getLogger(__name__)

README = "README.md"
_WEIGHTS = "diffusion_pytorch_model*"
_PIPELINE = "model_index.json"


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
    upload_statistics: bool = True,
) -> CommitInfo:
    """Upload a quantized pipeline, or a transformer alone, with a model card; `from_pretrained(repo_id)` loads it.

    All goes up in one commit: until it is whole nothing can be seen, and after an interruption the same call completes
    it without uploading whole files again (tested over LFS; a server of Xet was not at hand). Weights of an earlier
    push that are in the way are removed in that commit.

    comparison: of `dq.compare`; its figures go into the card, its files into `comparison/`.
    statistics: of `dq.calibrate`; described in the card and uploaded as `statistics.safetensors`, which others use
        with `DQConfig(statistics=repo_id)`. Of a pipeline with two denoisers {"transformer": ..., "transformer_2":
        ...}, as `statistics-<name>.safetensors`.
    upload_statistics: False describes them only. The file holds the calls' arguments, prompts among them, and inputs
        of the model that were made from them: anyone who may read the repository can read the prompts.
    call: keyword arguments of the card's example, of pictures and videos their paths or URLs; by default a prompt, or
        the first class.
    base_model, license: of the original, where its id is not what it was loaded from, or its card says no licence;
        what is neither given nor found is left out of the card and logged.
    metadata: more for the card's YAML block (license_name, license_link, language, tags, pipeline_tag).
    private: a repository that is made now; None is the owner's default.   revision: a branch, made if it is not there;
        the card's example loads it. Of a pull request ("refs/pr/1", create_pr=True) it loads the branch it is for.
    subfolder: of a transformer alone; diffusers finds pipelines at the top only.
    token: else HF_TOKEN or that of `hf auth login`.   create_pr: propose it instead, as a pull request.

    A README.md that is there keeps its metadata and its text outside the card's two markers. The card is always at the
    top, where the Hub shows it.
    Where on this disk the model and its statistics came from is taken out of the configurations that are uploaded.

    Raises, before any network, ValueError for what cannot be published: a model that is not quantized or carries an
    adapter, statistics of another one, a call that cannot be written down. Later, before anything is uploaded, where a
    private repository is asked for and a public one is there, and for a README.md that cannot be kept. Of the Hub:
    FileNotFoundError for a revision that is not there, PermissionError for a token that is missing, wrong or may not
    write, ConnectionError without a network or where the server broke off, RuntimeError where somebody else changed
    the repository in between.
    """
    is_pipeline = isinstance(pipe_or_transformer, DiffusionPipeline)
    of_parts, about, _ = _checked(
        pipe_or_transformer,
        repo_id,
        comparison=comparison,
        statistics=statistics,
        call=call,
        metadata={"base_model": base_model, "license": license} | dict(metadata or {}),
        revision=revision,
        subfolder=subfolder,
    )
    parts, subfolder = check_publishable(pipe_or_transformer), about["subfolder"]
    api = HfApi(token=token)
    with workplace(Path(tempfile.gettempdir(), "diffusers_dq-push")) as temporary:
        folder = temporary / "files"
        model = folder / subfolder
        saved = pipe_or_transformer if is_pipeline else denoiser(pipe_or_transformer)
        saved.save_pretrained(model)
        if comparison is not None:
            comparison.save((model / GRID).parent)
        for name, of_part in of_parts.items() if upload_statistics else ():
            of_part.save(model / (FILENAME if len(parts) == 1 else f"statistics-{name}.safetensors"))
            _tell_of_prompts(of_part, repo_id)
        _forget_paths(folder)
        places = {name: model / name if is_pipeline else model for name in parts}
        sizes = {name: sum(file.stat().st_size for file in p.glob("*.safetensors")) for name, p in places.items()}
        if not is_pipeline:
            sizes = {"transformer": sum(file.stat().st_size for file in model.glob(f"{_WEIGHTS}.safetensors"))}

        base = original(pipe_or_transformer, base_model, token)
        repo_id, parent = open_repository(api, repo_id, private=private, revision=revision)
        card = make_card(pipe_or_transformer, repo_id, base=base, file_bytes=sizes, **about)
        with explained("upload", repo_id, revision):
            there = api.list_repo_files(repo_id, revision=parent)
        existing = None
        if README in there:
            existing = fetch(repo_id, README, revision=parent, token=token).read_text(encoding="utf-8-sig")
        text = card.render(existing)
        for key in {"base_model", "license"} - read_card(text)[0].keys():
            logger.warning("the card of %s says no %s: none is known. Give %s=...", repo_id, key, key)
        (folder / README).write_text(text, encoding="utf-8")
        files = {str(file.relative_to(folder).as_posix()): file for file in folder.rglob("*") if file.is_file()}
        written = {_family(file) for file in files}
        return send(
            api,
            repo_id,
            files,
            message=commit_message or f"Upload {card.pipeline or card.parts[0]['class']}, quantized by diffusers_dq",
            revision=revision,
            parent=parent,
            create_pr=create_pr,
            delete=[file for file in there if file not in files and _family(file) in written],
        )


def check_push(
    pipe_or_transformer: Any,
    repo_id: str,
    *,
    statistics: Statistics | Mapping[str, Statistics] | None = None,
    call: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> str:
    """The user that `push_to_hub` would upload as: raises now, before hours of comparing, what it would raise later.

    Nothing is made on the Hub; a card that is there is read, as it may have to be mended. A token that may write
    there may still not write to this repository.
    Raises as `push_to_hub` does; PermissionError for a token that may only read.
    """
    _, _, card = _checked(
        pipe_or_transformer,
        repo_id,
        comparison=None,
        statistics=statistics,
        call=call,
        metadata=dict(metadata or {}),
        revision=revision,
        subfolder=subfolder,
    )
    with explained("upload", repo_id):
        about = HfApi(token=token).whoami()
    role = about.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise PermissionError(
            f"cannot upload {repo_id}: the token given may only read. Make one with write access at"
            f" {constants.ENDPOINT}/settings/tokens"
        )
    with suppress(FileNotFoundError):  # no such repository, branch or card yet
        card.render(fetch(repo_id, README, revision=revision, token=token).read_text(encoding="utf-8-sig"))
    return str(about["name"])


def _checked(
    pipe_or_transformer: Any,
    repo_id: str,
    *,
    statistics: Any,
    metadata: dict[str, Any],
    revision: str | None,
    subfolder: str | None,
    **more: Any,
) -> tuple[dict[str, Statistics], dict[str, Any], Card]:
    """(statistics by part, arguments of `make_card`, the card they make), no network used."""
    parts = check_publishable(pipe_or_transformer)
    if isinstance(pipe_or_transformer, DiffusionPipeline) and subfolder is not None:
        raise ValueError(
            f"subfolder={subfolder!r} is for a transformer alone: diffusers loads pipelines from the top of a"
            " repository; give another revision or another repository"
        )
    within = (subfolder or "").strip("/")
    if within and ({".", "..", ""} & set(within.split("/")) or "\\" in within):
        raise ValueError(f"subfolder must be a folder inside the repository, as 'transformer-w4', got {subfolder!r}")
    of_parts = _by_part(statistics, list(parts))
    about: dict[str, Any] = {
        "statistics": of_parts,
        "metadata": {key: value for key, value in metadata.items() if value is not None},
        "revision": "" if revision in (None, "main") or str(revision).startswith("refs/pr/") else str(revision),
        "subfolder": within,
        **more,
    }
    card = make_card(pipe_or_transformer, repo_id, **about)
    card.render()
    return of_parts, about, card


def _forget_paths(folder: Path) -> None:
    """Out of the configurations that were saved there: where on this disk something came from. What came from the Hub
    is named by its repository."""
    for file in folder.rglob("*.json"):
        try:
            content = json.loads(file.read_text(encoding="utf-8-sig"))
        except ValueError:  # of a part that is not ours: it goes as it is
            continue
        if isinstance(content, dict) and _forget(content):
            file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _forget(content: dict[str, Any]) -> bool:
    """Whether something was changed."""
    changed = False
    for key, value in list(content.items()):
        if isinstance(value, dict):
            changed |= _forget(value)
        elif isinstance(value, str) and (key in ("_name_or_path", "name_or_path") or key.endswith("_file")):
            known = value if key.endswith("_file") and not os.path.isabs(value) else named_on_hub(value)
            changed |= known != value
            content[key] = known
            if not known:
                del content[key]
    config = content.get("quantization_config")
    if isinstance(config, dict) and config.get("statistics") and not named_on_hub(str(config["statistics"])):
        config["statistics"], changed = None, True
    return changed


def _tell_of_prompts(statistics: Statistics, repo_id: str) -> None:
    calls = statistics.about.get("arguments", ())
    named = sorted({key for call in calls for key in call if key.endswith("prompt")})
    if named:
        logger.warning(
            "the statistics that go to %s hold %s of %d calibrated calls, which all who may read the repository can"
            " read; upload_statistics=False only describes them",
            repo_id,
            " and ".join(named),
            len(calls),
        )


def _family(path: str) -> tuple[str, str]:
    """Of a shard or an index, the folder and the file of weights that it stands for."""
    folder, _, name = path.rpartition("/")
    return folder, family(name)


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
        confirms. A quantized model's card leads to its original, and of a folder without one the name that diffusers
        noted when what was quantized was loaded. What cannot be found is not there.
    """
    source = base_model or _source(pipe_or_transformer)
    if not source:
        return {}
    folder = Path(source)
    if base_model is None and folder.is_dir():
        top = next((place for place in (folder, folder.parent) if (place / _PIPELINE).is_file()), folder)
        found = _metadata_in(top / README) if (top / README).is_file() else {}
        known = found.get("base_model") if found.get("base_model_relation") == "quantized" else None
        source = _quantized_from(top, folder)
        if found or not source:
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


def _quantized_from(top: Path, folder: Path) -> str:
    """The repository on the Hub that was quantized and saved to a folder; "" for one that is not of ours, or of a
    model of this disk."""
    configs = [folder / "config.json", *(top / name / "config.json" for name in DENOISERS)]
    quantizations = [_config_in(file).get("quantization_config") or {} for file in configs]
    ours = [config for config in quantizations if config.get("quant_method") == DQMethod.DIFFUSERS_DQ]
    for config in ours:
        origin = (config.get("result") or {}).get("origin")
        if isinstance(origin, str) and origin:
            return origin
    names = (_config_in(file).get("_name_or_path") for file in (top / _PIPELINE, *configs))
    known = [named_on_hub(name) for name in names if isinstance(name, str)] if ours else []
    return next(filter(None, known), "")


def _config_in(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _id(base_model: str | None) -> dict[str, Any]:
    return {} if base_model is None else {"base_model": base_model}


def _source(pipe_or_transformer: Any) -> str | None:
    """Where it was loaded from, a folder or an id; diffusers notes it."""
    name = getattr(pipe_or_transformer, "config", {}).get("_name_or_path")
    if not isinstance(name, str | os.PathLike) or not str(name):
        return None
    in_cache = cached(os.fspath(name))
    return "/".join(in_cache) if in_cache else os.fspath(name)


def _metadata_in(card: Path) -> dict[str, Any]:
    try:
        return read_card(card.read_text(encoding="utf-8-sig"))[0]
    except ValueError as error:
        logger.warning("no licence was taken from %s: %s", card, error)
        return {}


__all__ = ["check_push", "original", "push_to_hub"]
