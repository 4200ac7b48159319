# SPDX-License-Identifier: Apache-2.0
"""DiT (Peebles and Xie, 2023) as diffusers' DiTTransformer2DModel: adaLN-Zero with one modulation linear a block.

`norm1.linear` emits shift, scale, gate of the attention, then shift, scale, gate of the MLP, each of `width` rows.
`norm1.linear` and the timestep and class embedders run on [B, C]; diffusers repeats the embedders in every block.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, AttentionSite, LinearGroup, ModelSpec, ModulatedNorm, TimestepRange
from diffusers_dq.specs.blocks import alone, block_names, feed_forward, projections, self_attention


@SPECS.register("DiTTransformer2DModel")
def dit(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks")
    return ModelSpec(
        groups=tuple(group for block in blocks for group in _block_groups(block)),
        attention=tuple(AttentionSite(f"{b}.attn1", *projections(f"{b}.attn1")) for b in blocks),
        not_converted=("norm1.emb", "proj_out_1", "proj_out_2"),
        weight_only=frozenset(f"{block}.norm1.linear" for block in blocks),
        timestep=TimestepRange(noisiest=999),
        duplicates=tuple((f"{block}.norm1.emb", f"{blocks[0]}.norm1.emb") for block in blocks[1:]),
    )


def _block_groups(block: str) -> list[LinearGroup]:
    modulation = f"{block}.norm1.linear"
    return [
        *alone(modulation),
        *self_attention(f"{block}.attn1", ModulatedNorm(modulation, chunks=((0, 1),))),
        *feed_forward(f"{block}.ff", ModulatedNorm(modulation, chunks=((3, 4),))),
    ]
