# SPDX-License-Identifier: Apache-2.0
"""Allegro (Zhou et al., 2024) as diffusers' AllegroTransformer3DModel: adaLN-single, attention over the whole video.

The block is PixArt's but for rotary embeddings and for the name, `temb`, of what brings the modulation.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, ModelSpec, TimestepRange
from diffusers_dq.specs.blocks import TEXT_KEY_AND_VALUE, adaln_single_block, block_names, text_projections


@SPECS.register("AllegroTransformer3DModel")
def allegro(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks")
    return ModelSpec(
        groups=tuple(group for block in blocks for group in adaln_single_block(block, "temb")),
        not_converted=("adaln_single", "caption_projection", "proj_out", *TEXT_KEY_AND_VALUE),
        timestep=TimestepRange(noisiest=999),
        text=text_projections(blocks),
    )
