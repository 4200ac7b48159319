# SPDX-License-Identifier: Apache-2.0
"""Allegro (Zhou et al., 2024) as diffusers' AllegroTransformer3DModel: adaLN-single, attention over the whole video.

The block is PixArt's but for rotary embeddings and for the name, `temb`, of what brings the modulation.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, ModelSpec, TimestepRange, block_names
from diffusers_dq.specs.pixart import adaln_single_groups, text_projections


@SPECS.register("AllegroTransformer3DModel")
def allegro(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks")
    return ModelSpec(
        groups=tuple(group for block in blocks for group in adaln_single_groups(block, "temb")),
        not_converted=("adaln_single", "caption_projection", "proj_out", "attn2.to_k", "attn2.to_v"),
        timestep=TimestepRange(noisiest=999),
        text=text_projections(blocks),
    )
