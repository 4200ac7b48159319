# SPDX-License-Identifier: Apache-2.0
"""Lumina-Image 2.0 (Qin et al., 2025) as diffusers' Lumina2Transformer2DModel: norms that are scaled, never shifted.

`norm1.linear` emits scale and gate of the attention, then of the feed-forward layer: it carries scales, while shifts
are made online. The context refiner sees the text alone, has plain norms, and stays in full precision. Published
models share each key and value head among three query heads: then a value feeds three channels of the attention's
output, and cannot carry what is not alike in them. Text and image are one sequence before the first linear that sees
both.
"""

from typing import Any

from torch import nn

from diffusers_dq.specs.base import SPECS, ModelSpec, TimestepRange
from diffusers_dq.specs.blocks import block_names, scaled_block


@SPECS.register("Lumina2Transformer2DModel")
def lumina2(model: nn.Module) -> ModelSpec:
    """Timesteps grow from 0, noise, to 1."""
    config: Any = model.config
    own_values = config.num_kv_heads == config.num_attention_heads
    modulations = {
        block: f"{block}.norm1.linear" if model.get_submodule(block).modulation else None
        for block in block_names(model, "noise_refiner", "context_refiner", "layers")
    }
    feed_forward = ("linear_1", "linear_3", "linear_2")
    return ModelSpec(
        groups=tuple(
            group
            for block, modulation in modulations.items()
            for group in scaled_block(block, "attn", feed_forward, modulation, own_values)
        ),
        not_converted=("x_embedder", "time_caption_embed", "context_refiner", "norm_out"),
        weight_only=frozenset(filter(None, modulations.values())),
        timestep=TimestepRange(noisiest=0, cleanest=1),
    )
