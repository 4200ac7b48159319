# SPDX-License-Identifier: Apache-2.0
"""Open-Sora 1.0 and 1.2 (hpcai-tech, 2024) as our STDiTTransformer3DModel and STDiT3Transformer3DModel: adaLN-single.

Blocks name their layers as PixArt's, and read text alike. STDiT has a second self-attention in each block, over
frames, that reads the raw residual, without norm or modulation: nothing upstream can carry a change of its input,
which is where the largest outliers are to be expected. STDiT3 has whole blocks in space and in time by turns; where
some frames are given, they have a modulation of their own, in the same argument.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, ModelSpec, TimestepRange
from diffusers_dq.specs.blocks import (
    TEXT_KEY_AND_VALUE,
    adaln_single_block,
    block_names,
    self_attention,
    text_projections,
)

_NOT_CONVERTED = ("adaln_single", "caption_projection", "proj_out", *TEXT_KEY_AND_VALUE)


@SPECS.register("STDiTTransformer3DModel")
def stdit(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks")
    return ModelSpec(
        groups=tuple(
            group for b in blocks for group in (*adaln_single_block(b), *self_attention(f"{b}.attn_temporal"))
        ),
        not_converted=_NOT_CONVERTED,
        timestep=TimestepRange(noisiest=999),
        text=text_projections(blocks),
    )


@SPECS.register("STDiT3Transformer3DModel")
def stdit3(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks", "temporal_transformer_blocks")
    return ModelSpec(
        groups=tuple(group for block in blocks for group in adaln_single_block(block)),
        not_converted=_NOT_CONVERTED,
        timestep=TimestepRange(noisiest=1000),
        text=text_projections(blocks),
    )
