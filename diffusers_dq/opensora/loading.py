# SPDX-License-Identifier: Apache-2.0
"""Saved pipelines and models whose class is not known: diffusers looks for it in diffusers alone."""

import os
from typing import Any

from diffusers import AutoModel, DiffusionPipeline

from diffusers_dq.opensora.pipeline import OpenSoraPipeline
from diffusers_dq.opensora.pipeline12 import OpenSora12Pipeline
from diffusers_dq.opensora.stdit import STDiTTransformer3DModel
from diffusers_dq.opensora.stdit3 import STDiT3Transformer3DModel

_OURS = {
    kind.__name__: kind
    for kind in (OpenSoraPipeline, OpenSora12Pipeline, STDiTTransformer3DModel, STDiT3Transformer3DModel)
}


def pipeline_class(source: str | os.PathLike[str]) -> Any:
    """One of ours if a folder or a repository says so, else DiffusionPipeline, which finds diffusers' own."""
    return _class_named_in(source, DiffusionPipeline)


def model_class(folder: str | os.PathLike[str]) -> Any:
    """One of ours if a folder says so, else AutoModel, which finds diffusers' own."""
    return _class_named_in(folder, AutoModel)


def _class_named_in(source: str | os.PathLike[str], usual: Any) -> Any:
    return _OURS.get(usual.load_config(source).get("_class_name"), usual)
