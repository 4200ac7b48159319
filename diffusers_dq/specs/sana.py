# SPDX-License-Identifier: Apache-2.0
"""Sana and Sana-Sprint (Xie et al., 2024; Chen et al., 2025) as diffusers' SanaTransformer2DModel: adaLN-single.

As in PixArt one projection of the timestep serves all blocks. Self-attention is linear: it divides by a sum of ReLU
features that may be zero, so its weights need not sum to one: a change of its output is made online. Cross-attention
reads the raw residual; its output is a mean of values as usual. The feed-forward layer is made of convolutions, which
stay in full precision although they hold nearly half of a block's weights.
"""

from typing import Any

from torch import nn

from diffusers_dq.specs.base import SPECS, LinearGroup, ModelSpec, ModulatedNorm, ModulationArgument, TimestepRange
from diffusers_dq.specs.blocks import (
    TEXT_KEY_AND_VALUE,
    block_names,
    cross_attention,
    self_attention,
    text_projections,
)


@SPECS.register("SanaTransformer2DModel")
def sana(model: nn.Module) -> ModelSpec:
    """Pipelines scale timesteps as the model's config says; Sprint, known by its guidance, counts from 1 to 0."""
    config: Any = model.config
    blocks = block_names(model, "transformer_blocks")
    return ModelSpec(
        groups=tuple(group for block in blocks for group in _block_groups(block)),
        not_converted=("time_embed", "caption_projection", "proj_out", *TEXT_KEY_AND_VALUE),
        timestep=TimestepRange(noisiest=1 if config.guidance_embeds else 1000 * config.timestep_scale),
        text=text_projections(blocks),
    )


def _block_groups(block: str) -> list[LinearGroup]:
    modulation = ModulationArgument(block, "timestep", chunks=6, table="scale_shift_table")
    return [
        *self_attention(f"{block}.attn1", ModulatedNorm(modulation), carries=False),
        *cross_attention(f"{block}.attn2"),
    ]
