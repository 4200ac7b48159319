# SPDX-License-Identifier: Apache-2.0
"""The transformers of diffusers with tiny random weights, and what their forward takes: one module a family.

`MODELS` has one or more `TinyModel`s for each class; widths are multiples of 16 so that every method fits.
"""

import importlib
import pkgutil

from tiny_models.base import MODELS, TinyModel

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["MODELS", "TinyModel"]
