# SPDX-License-Identifier: Apache-2.0
"""Cosmos-Predict 1, 2 and 2.5 (NVIDIA, 2025) as diffusers' CosmosTransformer3DModel: adaLN in two narrow linears.

The modulation of a norm, shift, scale, gate, is what its own two linears make of the timestep, plus one that is made
once for all norms of all blocks. A change of basis would have to multiply both terms, of which a producer is only one:
norms carry none yet. Where frames are at different steps (some are given) the modulation is one a token, so the narrow
linears run on tokens; their input is not rounded all the same. Models of 2.5 with a picture as context add a second
cross-attention, with a query of its own; then the output of both carries no change. Keys and values of text and of the
picture do not change with the timestep and their input is a few hundred tokens: they stay in full precision.

Pipelines of version 1 pass ln(sigma) / 4 for sigma from 80 to 0.002, later ones numbers from 1 to 0.
"""

import math

from torch import nn

from diffusers_dq.specs.base import SPECS, LinearGroup, ModelSpec, TimestepRange
from diffusers_dq.specs.blocks import (
    TEXT_KEY_AND_VALUE,
    alone,
    block_names,
    cross_attention,
    feed_forward,
    self_attention,
    text_projections,
)

_PICTURE_KEY_AND_VALUE = ("attn2.k_img", "attn2.v_img")


@SPECS.register("CosmosTransformer3DModel")
def cosmos(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks")
    picture = hasattr(model, "img_context_proj")
    read_once = (*TEXT_KEY_AND_VALUE, *(_PICTURE_KEY_AND_VALUE if picture else ()))
    contexts = [name for name in ("crossattn_proj", "img_context_proj") if hasattr(model, name)]
    return ModelSpec(
        groups=tuple(group for block in blocks for group in _block_groups(block, picture)),
        not_converted=("patch_embed", "time_embed", "norm_out", "proj_out", *contexts, *read_once),
        weight_only=frozenset(linear for block in blocks for linear in _modulations(block)),
        timestep=TimestepRange(noisiest=math.log(80) / 4, cleanest=math.log(0.002) / 4, per_token=True),
        text=text_projections(blocks, read_once),
    )


def _modulations(block: str) -> list[str]:
    return [f"{block}.{norm}.linear_{i}" for norm in ("norm1", "norm2", "norm3") for i in (1, 2)]


def _block_groups(block: str, picture: bool) -> list[LinearGroup]:
    groups = [
        *alone(*_modulations(block)),
        *self_attention(f"{block}.attn1"),
        *cross_attention(f"{block}.attn2", beside_query=("q_img",) if picture else (), carries=not picture),
        *feed_forward(f"{block}.ff"),
    ]
    if picture:
        groups.append(LinearGroup(tuple(f"{block}.{linear}" for linear in _PICTURE_KEY_AND_VALUE)))
    return groups
