# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image (Wu et al., 2025) as diffusers' QwenImageTransformer2DModel: two streams with joint attention throughout.

Each stream of a block has a modulation linear of its own, `img_mod.1` and `txt_mod.1`: shift, scale, gate of the
attention, then of the feed-forward. Models that edit (`zero_cond_t`) run it twice, at the timestep for the tokens of
the new picture and at zero for those of the given ones; both are of one timestep group. Pipelines pass t / 1000.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, LinearGroup, ModelSpec, TimestepRange
from diffusers_dq.specs.blocks import alone, block_names, image_stream, text_stream


@SPECS.register("QwenImageTransformer2DModel")
def qwenimage(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks")
    return ModelSpec(
        groups=tuple(group for block in blocks for group in _block_groups(block)),
        not_converted=("time_text_embed", "img_in", "txt_in", "norm_out", "proj_out"),
        weight_only=frozenset(f"{block}.{stream}_mod.1" for block in blocks for stream in ("img", "txt")),
        timestep=TimestepRange(noisiest=1),
    )


def _block_groups(block: str) -> list[LinearGroup]:
    image, text = f"{block}.img_mod.1", f"{block}.txt_mod.1"
    return [
        *alone(image),
        *image_stream(block, image, "img_mlp"),
        *alone(text),
        *text_stream(block, text, "txt_mlp"),
    ]
