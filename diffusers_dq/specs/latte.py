# SPDX-License-Identifier: Apache-2.0
"""Latte (Ma et al., 2024) as diffusers' LatteTransformer3DModel: adaLN-single, blocks in space and in time by turns.

Both kinds are PixArt's block, those in time without cross-attention. The model repeats the one modulation for every
frame, or for every patch, so that blocks are called with as many rows as they see sequences.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, ModelSpec, TimestepRange
from diffusers_dq.specs.blocks import TEXT_KEY_AND_VALUE, adaln_single_block, block_names, text_projections


@SPECS.register("LatteTransformer3DModel")
def latte(model: nn.Module) -> ModelSpec:
    spatial, temporal = block_names(model, "transformer_blocks"), block_names(model, "temporal_transformer_blocks")
    return ModelSpec(
        groups=tuple(
            group
            for blocks, reads_text in ((spatial, True), (temporal, False))
            for block in blocks
            for group in adaln_single_block(block, reads_text=reads_text)
        ),
        not_converted=("adaln_single", "caption_projection", "proj_out", *TEXT_KEY_AND_VALUE),
        timestep=TimestepRange(noisiest=999),
        text=text_projections(spatial),
    )
