# SPDX-License-Identifier: Apache-2.0
"""Latte (Ma et al., 2024) as diffusers' LatteTransformer3DModel: adaLN-single, blocks in space and in time by turns.

Both kinds are PixArt's block, those in time without cross-attention. The model repeats the one modulation for every
frame, or for every patch, so that blocks are called with as many rows as they see sequences.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, ModelSpec, TimestepRange
from diffusers_dq.specs.pixart import adaln_single_groups


@SPECS.register("LatteTransformer3DModel")
def latte(model: nn.Module) -> ModelSpec:
    depth = len(model.transformer_blocks)  # type: ignore[arg-type]
    return ModelSpec(
        groups=tuple(
            group
            for i in range(depth)
            for part, reads_text in (("transformer_blocks", True), ("temporal_transformer_blocks", False))
            for group in adaln_single_groups(f"{part}.{i}", reads_text=reads_text)
        ),
        not_converted=("adaln_single", "caption_projection", "proj_out", "attn2.to_k", "attn2.to_v"),
        timestep=TimestepRange(noisiest=999),
    )
