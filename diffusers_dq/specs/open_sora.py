# SPDX-License-Identifier: Apache-2.0
"""Open-Sora 1.0 and 1.2 (hpcai-tech, 2024) as our STDiTTransformer3DModel and STDiT3Transformer3DModel: adaLN-single.

Blocks name their layers as PixArt's, and read text alike. STDiT has a second self-attention in each block, over
frames, that reads the raw residual, without norm or modulation: nothing upstream can carry a change of its input,
which is where the largest outliers are to be expected. STDiT3 has whole blocks in space and in time by turns; where
some frames are given, they have a modulation of their own, in the same argument.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, LinearGroup, ModelSpec, TimestepRange, ValueProjection, block_names
from diffusers_dq.specs.pixart import adaln_single_groups, text_projections

_NOT_CONVERTED = ("adaln_single", "caption_projection", "proj_out", "attn2.to_k", "attn2.to_v")


@SPECS.register("STDiTTransformer3DModel")
def stdit(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks")
    return ModelSpec(
        groups=tuple(group for b in blocks for group in (*adaln_single_groups(b), *_temporal_groups(b))),
        not_converted=_NOT_CONVERTED,
        timestep=TimestepRange(noisiest=999),
        text=text_projections(blocks),
    )


@SPECS.register("STDiT3Transformer3DModel")
def stdit3(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks", "temporal_transformer_blocks")
    return ModelSpec(
        groups=tuple(group for block in blocks for group in adaln_single_groups(block)),
        not_converted=_NOT_CONVERTED,
        timestep=TimestepRange(noisiest=1000),
        text=text_projections(blocks),
    )


def _temporal_groups(block: str) -> list[LinearGroup]:
    query, key, value = (f"{block}.attn_temporal.to_{letter}" for letter in "qkv")
    return [
        LinearGroup((query, key, value)),
        LinearGroup((f"{block}.attn_temporal.to_out.0",), ValueProjection(value)),
    ]
