# SPDX-License-Identifier: Apache-2.0
"""Open-Sora 1.0 and 1.2, which diffusers lacks: transformers, pipelines, and a reader of published checkpoints."""

from diffusers_dq.opensora.base import OpenSoraPipelineOutput
from diffusers_dq.opensora.captions import clean_caption
from diffusers_dq.opensora.checkpoint import from_original, load_open_sora
from diffusers_dq.opensora.pipeline import OpenSoraPipeline, iddpm_scheduler
from diffusers_dq.opensora.pipeline12 import OpenSora12Pipeline, rectified_flow_scheduler
from diffusers_dq.opensora.stdit import STDiTTransformer3DModel
from diffusers_dq.opensora.stdit3 import STDiT3Transformer3DModel

__all__ = [
    "OpenSora12Pipeline",
    "OpenSoraPipeline",
    "OpenSoraPipelineOutput",
    "STDiT3Transformer3DModel",
    "STDiTTransformer3DModel",
    "clean_caption",
    "from_original",
    "iddpm_scheduler",
    "load_open_sora",
    "rectified_flow_scheduler",
]
