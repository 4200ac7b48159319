# SPDX-License-Identifier: Apache-2.0
"""What is to be evaluated, and with which conditions."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_dq.opensora.loading import pipeline_class
from diffusers_dq.repository import fetch, split_repository

_PARTS = "model_index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(model: str, dtype: str, device: str) -> DiffusionPipeline:
    """model: a folder, or OWNER/NAME[@REVISION] on the Hub.

    Raises ValueError and as `pipeline_folder`, in one line, where there is no such pipeline.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    kind = pipeline_class(pipeline_folder(model))
    source, revision = (None if Path(model).exists() else split_repository(model)) or (model, None)
    try:
        pipe: DiffusionPipeline = kind.from_pretrained(source, revision=revision, dtype=DTYPES[dtype])
    except OSError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"the pipeline {model} cannot be loaded: {reason}") from error
    return pipe.to(device)


def pipeline_folder(model: str) -> Path:
    """Where its list of parts is: the folder itself, or one of the Hub's cache, with nothing else of it downloaded.

    Raises ValueError, FileNotFoundError, PermissionError, ConnectionError where no pipeline is there.
    """
    folder = Path(model)
    if folder.exists():
        if not (folder / _PARTS).is_file():
            raise ValueError(f"{model} holds no {_PARTS}; give a folder that pipe.save_pretrained wrote")
        return folder
    repository = split_repository(model)
    if repository is None:
        raise ValueError(
            f"there is no folder {model}; give the folder of a pipeline or its name on the Hub, owner/name"
        )
    name, revision = repository
    return fetch(name, _PARTS, revision=revision).parent


def class_labels(pipe: DiffusionPipeline, classes: int | None) -> Sequence[int]:
    """0 to classes - 1, or without a number the labels that the pipeline names, or all that the transformer has;
    () for one that has none."""
    known = getattr(getattr(pipe, "transformer", None), "config", {}).get("num_embeds_ada_norm")
    if classes is not None:
        if classes < 1 or (known is not None and classes > known):
            raise ValueError(f"--classes must be 1 to {known or 'the number of classes'}, got {classes}")
        return range(classes)
    named: Mapping[str, int] = getattr(pipe, "labels", None) or {}
    conditional = "class_labels" in inspect.signature(pipe.__call__).parameters
    return sorted(set(named.values())) or range(known if known and conditional else 0)


def read_prompts(file: Path) -> list[str]:
    """The lines that are not empty. Raises ValueError where there is none."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        state = "holds no prompt" if file.is_file() else "is no file"
        raise ValueError(f"{file} {state}; --prompts takes a text file with a prompt a line")
    return prompts
