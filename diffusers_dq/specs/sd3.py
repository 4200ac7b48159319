# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5 (Esser et al., 2024) as diffusers' SD3Transformer2DModel: two streams, joint attention.

Each stream of a block has a modulation linear of its own: shift, scale, gate of the attention, then of the
feed-forward; in blocks with a second self-attention of the picture (3.5 medium) three more for it. The last block lets
go of the text after the attention: its modulation of the text is only scale and shift, in this order.
Values of a joint attention come from two linears, one a stream, and each stream's output reads both: a change of basis
would have to be the same in both outputs, so neither carries one. The second self-attention has one.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, LinearGroup, ModelSpec, ModulatedNorm, TimestepRange
from diffusers_dq.specs.blocks import added_projections, alone, block_names, image_stream, self_attention, text_stream


@SPECS.register("SD3Transformer2DModel")
def sd3(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks")
    modulations = [f"{block}.{norm}.linear" for block in blocks for norm in ("norm1", "norm1_context")]
    return ModelSpec(
        groups=tuple(group for block in blocks for group in _block_groups(block, model.get_submodule(block))),
        not_converted=("time_text_embed", "context_embedder", "norm_out", "proj_out"),
        weight_only=frozenset(modulations),
        timestep=TimestepRange(),
    )


def _block_groups(block: str, module: nn.Module) -> list[LinearGroup]:
    image, text = f"{block}.norm1.linear", f"{block}.norm1_context.linear"
    groups = [*alone(image, text), *image_stream(block, image)]
    if module.attn2 is not None:
        groups += self_attention(f"{block}.attn2", ModulatedNorm(image, chunks=((6, 7),)))
    if module.context_pre_only:
        reads = added_projections(f"{block}.attn")
        return [*groups, LinearGroup(reads, ModulatedNorm(text, chunks=((1, 0),)))]
    return [*groups, *text_stream(block, text)]
