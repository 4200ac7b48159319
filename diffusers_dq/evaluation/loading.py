# SPDX-License-Identifier: Apache-2.0
"""What is to be evaluated, and with which conditions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_dq.opensora.loading import pipeline_class

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(model: str, dtype: str, device: str) -> DiffusionPipeline:
    """Raises ValueError, in one line, where there is no such pipeline."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    folder = Path(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"{model} holds no model_index.json; give a folder that pipe.save_pretrained wrote")
    if not folder.exists() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise ValueError(
            f"there is no folder {model}; give the folder of a pipeline or its name on the Hub, owner/name"
        )
    try:
        pipe = pipeline_class(model).from_pretrained(model, dtype=DTYPES[dtype])
    except OSError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(
            f"no pipeline {model}: no such folder here, and the Hub did not give it ({reason})"
        ) from error
    return pipe.to(device)


def class_labels(pipe: DiffusionPipeline, classes: int | None) -> Sequence[int]:
    """0 to classes - 1, or without a number the labels that the pipeline names; () for one that names none."""
    if classes is not None:
        known = getattr(getattr(pipe, "transformer", None), "config", {}).get("num_embeds_ada_norm")
        if classes < 1 or (known is not None and classes > known):
            raise ValueError(f"--classes must be 1 to {known or 'the number of classes'}, got {classes}")
        return range(classes)
    named: Mapping[str, int] = getattr(pipe, "labels", None) or {}
    return sorted(set(named.values()))


def read_prompts(file: Path) -> list[str]:
    """The lines that are not empty. Raises ValueError where there is none."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        state = "holds no prompt" if file.is_file() else "is no file"
        raise ValueError(f"{file} {state}; --prompts takes a text file with a prompt a line")
    return prompts
