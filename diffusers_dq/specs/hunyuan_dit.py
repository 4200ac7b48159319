# SPDX-License-Identifier: Apache-2.0
"""Hunyuan-DiT (Li et al., 2024) as diffusers' HunyuanDiT2DModel: one modulated norm a block, and that only shifts.

`norm1.linear` emits the shift of the self-attention's input, nothing else: it carries shifts, while scales are made
online. The norms before cross-attention, feed-forward and long skips have weights of their own and no modulation.
The upper half of the blocks reads the lower half's outputs through `skip_linear`.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, LinearGroup, ModelSpec, ModulatedNorm, TimestepRange
from diffusers_dq.specs.blocks import (
    TEXT_KEY_AND_VALUE,
    alone,
    block_names,
    cross_attention,
    feed_forward,
    self_attention,
    text_projections,
)

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
        not_converted=("text_embedder", "time_extra_emb", "norm_out", "proj_out", *TEXT_KEY_AND_VALUE),
        weight_only=frozenset(f"{block}.norm1.linear" for block in blocks),
        timestep=TimestepRange(noisiest=999),
        text=text_projections(blocks, arguments=_TEXT),
    )


def _block_groups(block: str, skips: bool) -> list[LinearGroup]:
    modulation = f"{block}.norm1.linear"
    return [
        *(alone(f"{block}.skip_linear") if skips else ()),
        *alone(modulation),
        *self_attention(f"{block}.attn1", ModulatedNorm(modulation, chunks=((0, None),))),
        *cross_attention(f"{block}.attn2"),
        *feed_forward(f"{block}.ff"),
    ]
