# SPDX-License-Identifier: Apache-2.0
"""Transformer architectures: one file each says which linears share an input and what upstream can carry a fold."""

from diffusers_dq.registry import import_submodules
from diffusers_dq.specs.base import (
    SPECS,
    AttentionSite,
    LinearGroup,
    ModelSpec,
    ModulatedNorm,
    ModulationArgument,
    Producer,
    RowUpdate,
    TextProjections,
    TimestepRange,
    ValueProjection,
    spec_of,
    undescribed,
)

import_submodules(__name__)

__all__ = [
    "SPECS",
    "AttentionSite",
    "LinearGroup",
    "ModelSpec",
    "ModulatedNorm",
    "ModulationArgument",
    "Producer",
    "RowUpdate",
    "TextProjections",
    "TimestepRange",
    "ValueProjection",
    "spec_of",
    "undescribed",
]
