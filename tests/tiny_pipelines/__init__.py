# SPDX-License-Identifier: Apache-2.0
"""Pipelines of diffusers with tiny random components, and calls of them: one module a family.

Nothing is downloaded: prompts are given as embeddings, text encoders and tokenizers are None.
"""

import importlib
import pkgutil

from tiny_pipelines.base import PIPELINES, TinyPipeline

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["PIPELINES", "TinyPipeline"]
