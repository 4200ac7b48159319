# SPDX-License-Identifier: Apache-2.0
"""DiT (Peebles and Xie, 2023) as diffusers' DiTTransformer2DModel: adaLN-Zero with one modulation linear a block.

`norm1.linear` emits shift, scale, gate of the attention, then shift, scale, gate of the MLP, each of `width` rows.
`norm1.linear` and the timestep and class embedders run on [B, C]; diffusers repeats the embedders in every block.
"""

from torch import nn

from diffusers_dq.specs.base import (
    SPECS,
    AttentionSite,
    LinearGroup,
    ModelSpec,
    ModulatedNorm,
    TimestepRange,
    ValueProjection,
    block_names,
)


@SPECS.register("DiTTransformer2DModel")
def dit(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks")
    return ModelSpec(
        groups=tuple(group for block in blocks for group in _block_groups(block)),
        attention=tuple(
            AttentionSite(f"{b}.attn1", f"{b}.attn1.to_q", f"{b}.attn1.to_k", f"{b}.attn1.to_v") for b in blocks
        ),
        not_converted=("norm1.emb", "proj_out_1", "proj_out_2"),
        weight_only=frozenset(f"{block}.norm1.linear" for block in blocks),
        timestep=TimestepRange(noisiest=999),
        duplicates=tuple((f"{block}.norm1.emb", f"{blocks[0]}.norm1.emb") for block in blocks[1:]),
    )


def _block_groups(block: str) -> list[LinearGroup]:
    modulation = f"{block}.norm1.linear"
    query, key, value = (f"{block}.attn1.to_{letter}" for letter in "qkv")
    return [
        LinearGroup((modulation,)),
        LinearGroup((query, key, value), ModulatedNorm(modulation, chunks=((0, 1),))),
        LinearGroup((f"{block}.attn1.to_out.0",), ValueProjection(value)),
        LinearGroup((f"{block}.ff.net.0.proj",), ModulatedNorm(modulation, chunks=((3, 4),))),
        LinearGroup((f"{block}.ff.net.2",)),
    ]
