# SPDX-License-Identifier: Apache-2.0
"""PixArt-alpha and -Sigma (Chen et al., 2023 and 2024) as diffusers' PixArtTransformer2DModel: adaLN-single.

One projection of the timestep serves all blocks, which add `scale_shift_table` to it: shift, scale, gate of the
self-attention, then of the MLP. Cross-attention reads the raw residual, without a norm. Keys and values of text do not
change with the timestep and their input is a few hundred tokens: they stay in full precision.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, ModelSpec, TimestepRange
from diffusers_dq.specs.blocks import TEXT_KEY_AND_VALUE, adaln_single_block, block_names, text_projections


@SPECS.register("PixArtTransformer2DModel")
def pixart(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks")
    return ModelSpec(
        groups=tuple(group for block in blocks for group in adaln_single_block(block)),
        not_converted=("adaln_single", "caption_projection", "proj_out", *TEXT_KEY_AND_VALUE),
        timestep=TimestepRange(noisiest=999),
        text=text_projections(blocks),
    )
