# SPDX-License-Identifier: Apache-2.0
"""Chroma (lodestones, 2025) as diffusers' ChromaTransformer2DModel: FLUX.1 without modulation linears in its blocks.

`distilled_guidance_layer` makes the modulation of all blocks at once from the timestep; a block is called with its
part of it, [B, 12, C] for six of the picture and six of the text, [B, 3, C] in blocks of one stream. Pipelines pass
t / 1000.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, LinearGroup, ModelSpec, ModulationArgument, TimestepRange
from diffusers_dq.specs.blocks import block_names, image_stream, parallel_block, text_stream


@SPECS.register("ChromaTransformer2DModel")
def chroma(model: nn.Module) -> ModelSpec:
    groups: list[LinearGroup] = []
    for block in block_names(model, "transformer_blocks"):
        both = ModulationArgument(block, "temb", chunks=12)
        groups += [*image_stream(block, both), *text_stream(block, both, first=6)]
    for block in block_names(model, "single_transformer_blocks"):
        groups += parallel_block(block, ModulationArgument(block, "temb", chunks=3))
    return ModelSpec(
        groups=tuple(groups),
        not_converted=("distilled_guidance_layer", "context_embedder", "x_embedder", "proj_out"),
        timestep=TimestepRange(noisiest=1),
    )
