# SPDX-License-Identifier: Apache-2.0
"""Quantization methods, one file a paper; importing the package registers them all."""

from diffusers_dq.methods.base import METHODS, Method, MethodOptions, Site, Solution
from diffusers_dq.registry import import_submodules

import_submodules(__name__)


def methods() -> dict[str, str]:
    """The name of each method and what it does in a line."""
    return {name: METHODS[name].summary for name in METHODS}


__all__ = ["METHODS", "Method", "MethodOptions", "Site", "Solution", "methods"]
