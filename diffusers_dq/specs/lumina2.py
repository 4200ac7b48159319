# SPDX-License-Identifier: Apache-2.0
"""Lumina-Image 2.0 (Qin et al., 2025) as diffusers' Lumina2Transformer2DModel: norms that are scaled, never shifted.

`norm1.linear` emits scale and gate of the attention, then of the feed-forward layer: it carries scales, while shifts
are made online. The context refiner, which sees the text alone, has plain norms. Published models share each key and
value head among three query heads: then a value feeds three channels of the attention's output, and cannot carry what
is not alike in them. Text and image are one sequence before the first linear that sees both.
"""

from typing import Any

from torch import nn

from diffusers_dq.specs.base import (
    SPECS,
    LinearGroup,
    ModelSpec,
    ModulatedNorm,
    TimestepRange,
    ValueProjection,
    block_names,
)


@SPECS.register("Lumina2Transformer2DModel")
def lumina2(model: nn.Module) -> ModelSpec:
    """Timesteps grow from 0, noise, to 1."""
    config: Any = model.config
    own_values = config.num_kv_heads == config.num_attention_heads
    modulations = {
        block: f"{block}.norm1.linear" if model.get_submodule(block).modulation else None
        for block in block_names(model, "noise_refiner", "context_refiner", "layers")
    }
    projections = ("feed_forward.linear_1", "feed_forward.linear_3", "feed_forward.linear_2")
    return ModelSpec(
        groups=tuple(
            group
            for block, modulation in modulations.items()
            for group in scaled_block_groups(block, "attn", projections, modulation, own_values)
        ),
        not_converted=("x_embedder", "time_caption_embed", "norm_out"),
        weight_only=frozenset(filter(None, modulations.values())),
        timestep=TimestepRange(noisiest=0, cleanest=1),
    )


def scaled_block_groups(
    block: str, attention: str, feed_forward: tuple[str, str, str], modulation: str | None, own_values: bool
) -> list[LinearGroup]:
    """Of a block whose norms are only scaled, with self-attention and a gated feed-forward layer.

    attention, feed_forward: their names in the block, of the latter those of gate, up and down projections.
    modulation: the linear that emits scale, gate, scale, gate; None where norms are plain.
    own_values: whether each query head has a value head of its own.
    """
    query, key, value = (f"{block}.{attention}.to_{letter}" for letter in "qkv")
    gate, up, down = (f"{block}.{name}" for name in feed_forward)
    norms = [None if modulation is None else ModulatedNorm(modulation, chunks=((None, scale),)) for scale in (0, 2)]
    return [
        *([] if modulation is None else [LinearGroup((modulation,))]),
        LinearGroup((query, key, value), norms[0]),
        LinearGroup((f"{block}.{attention}.to_out.0",), ValueProjection(value) if own_values else None),
        LinearGroup((gate, up), norms[1]),
        LinearGroup((down,)),
    ]
