# SPDX-License-Identifier: Apache-2.0
"""Hunyuan-DiT (Li et al., 2024) as diffusers' HunyuanDiT2DModel: one modulated norm a block, and that only shifts.

`norm1.linear` emits the shift of the self-attention's input, nothing else: it carries shifts, while scales are made
online. The norms before cross-attention, feed-forward and long skips have weights of their own and no modulation.
The upper half of the blocks reads the lower half's outputs through `skip_linear`.
"""

from torch import nn

from diffusers_dq.specs.base import (
    SPECS,
    LinearGroup,
    ModelSpec,
    ModulatedNorm,
    TextProjections,
    TimestepRange,
    ValueProjection,
    block_names,
)
from diffusers_dq.specs.pixart import text_projections

_TEXT = ("encoder_hidden_states", "text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5")


@SPECS.register("HunyuanDiT2DModel")
def hunyuan_dit(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "blocks")
    return ModelSpec(
        groups=tuple(
            group
            for block in blocks
            for group in _block_groups(block, skips=model.get_submodule(block).skip_linear is not None)
        ),
        not_converted=("text_embedder", "time_extra_emb", "norm_out", "proj_out", "attn2.to_k", "attn2.to_v"),
        weight_only=frozenset(f"{block}.norm1.linear" for block in blocks),
        timestep=TimestepRange(noisiest=999),
        text=TextProjections(text_projections(blocks).linears, _TEXT),
    )


def _block_groups(block: str, skips: bool) -> list[LinearGroup]:
    modulation = f"{block}.norm1.linear"
    query, key, value = (f"{block}.attn1.to_{letter}" for letter in "qkv")
    text_query, text_key, text_value = (f"{block}.attn2.to_{letter}" for letter in "qkv")
    return [
        *([LinearGroup((f"{block}.skip_linear",))] if skips else ()),
        LinearGroup((modulation,)),
        LinearGroup((query, key, value), ModulatedNorm(modulation, chunks=((0, None),))),
        LinearGroup((f"{block}.attn1.to_out.0",), ValueProjection(value)),
        LinearGroup((text_query,)),
        LinearGroup((text_key, text_value)),
        LinearGroup((f"{block}.attn2.to_out.0",), ValueProjection(text_value)),
        LinearGroup((f"{block}.ff.net.0.proj",)),
        LinearGroup((f"{block}.ff.net.2",)),
    ]
