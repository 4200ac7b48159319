# SPDX-License-Identifier: Apache-2.0
"""PixArt-alpha and -Sigma (Chen et al., 2023 and 2024) as diffusers' PixArtTransformer2DModel: adaLN-single.

One projection of the timestep serves all blocks, which add `scale_shift_table` to it: shift, scale, gate of the
self-attention, then of the MLP. Cross-attention reads the raw residual, without a norm. Keys and values of text do not
change with the timestep and their input is a few hundred tokens: they stay in full precision.
"""

from collections.abc import Iterable

from torch import nn

from diffusers_dq.specs.base import (
    SPECS,
    LinearGroup,
    ModelSpec,
    ModulatedNorm,
    ModulationArgument,
    TextProjections,
    TimestepRange,
    ValueProjection,
    block_names,
)


@SPECS.register("PixArtTransformer2DModel")
def pixart(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks")
    return ModelSpec(
        groups=tuple(group for block in blocks for group in adaln_single_groups(block)),
        not_converted=("adaln_single", "caption_projection", "proj_out", "attn2.to_k", "attn2.to_v"),
        timestep=TimestepRange(noisiest=999),
        text=text_projections(blocks),
    )


def text_projections(blocks: Iterable[str]) -> TextProjections:
    return TextProjections(tuple(f"{block}.attn2.to_{letter}" for block in blocks for letter in "kv"))


def adaln_single_groups(block: str, argument: str = "timestep", reads_text: bool = True) -> list[LinearGroup]:
    """Of a BasicTransformerBlock with "ada_norm_single", and of blocks that name their layers alike.

    argument: of the block's forward, that brings the modulation.   reads_text: whether it has cross-attention.
    """
    modulation = ModulationArgument(block, argument, chunks=6, table="scale_shift_table")
    query, key, value = (f"{block}.attn1.to_{letter}" for letter in "qkv")
    text_query, text_key, text_value = (f"{block}.attn2.to_{letter}" for letter in "qkv")
    text = [
        LinearGroup((text_query,)),
        LinearGroup((text_key, text_value)),
        LinearGroup((f"{block}.attn2.to_out.0",), ValueProjection(text_value)),
    ]
    return [
        LinearGroup((query, key, value), ModulatedNorm(modulation, chunks=((0, 1),))),
        LinearGroup((f"{block}.attn1.to_out.0",), ValueProjection(value)),
        *(text if reads_text else ()),
        LinearGroup((f"{block}.ff.net.0.proj",), ModulatedNorm(modulation, chunks=((3, 4),))),
        LinearGroup((f"{block}.ff.net.2",)),
    ]
