# SPDX-License-Identifier: Apache-2.0
"""PixArt-alpha and -Sigma (Chen et al., 2023 and 2024) as diffusers' PixArtTransformer2DModel: adaLN-single.

One projection of the timestep serves all blocks, which add `scale_shift_table` to it: shift, scale, gate of the
self-attention, then of the MLP. Cross-attention reads the raw residual, without a norm. Keys and values of text do not
change with the timestep and their input is a few hundred tokens: they stay in full precision.
"""

from torch import nn

from diffusers_dq.specs.base import (
    SPECS,
    LinearGroup,
    ModelSpec,
    ModulatedNorm,
    ModulationArgument,
    TimestepRange,
    ValueProjection,
)


@SPECS.register("PixArtTransformer2DModel")
def pixart(model: nn.Module) -> ModelSpec:
    blocks = [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]  # type: ignore[arg-type]
    return ModelSpec(
        groups=tuple(group for block in blocks for group in adaln_single_groups(block)),
        not_converted=("adaln_single", "caption_projection", "proj_out", "attn2.to_k", "attn2.to_v"),
        timestep=TimestepRange(noisiest=999),
    )


def adaln_single_groups(block: str) -> list[LinearGroup]:
    """Of a BasicTransformerBlock with "ada_norm_single"."""
    modulation = ModulationArgument(block, "timestep", chunks=6, table="scale_shift_table")
    query, key, value = (f"{block}.attn1.to_{letter}" for letter in "qkv")
    text_query, text_key, text_value = (f"{block}.attn2.to_{letter}" for letter in "qkv")
    return [
        LinearGroup((query, key, value), ModulatedNorm(modulation, chunks=((0, 1),))),
        LinearGroup((f"{block}.attn1.to_out.0",), ValueProjection(value)),
        LinearGroup((text_query,)),
        LinearGroup((text_key, text_value)),
        LinearGroup((f"{block}.attn2.to_out.0",), ValueProjection(text_value)),
        LinearGroup((f"{block}.ff.net.0.proj",), ModulatedNorm(modulation, chunks=((3, 4),))),
        LinearGroup((f"{block}.ff.net.2",)),
    ]
