# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image (Wu et al., 2025) as diffusers' QwenImageTransformer2DModel: two streams with joint attention throughout.

Each stream of a block has a modulation linear of its own, `img_mod.1` and `txt_mod.1`: shift, scale, gate of the
attention, then of the feed-forward. Models that edit (`zero_cond_t`) run it twice, at the timestep for the tokens of
the new picture and at zero for those of the given ones; both are of one timestep group. Pipelines pass t / 1000.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, LinearGroup, ModelSpec, TimestepRange, alone, block_names
from diffusers_dq.specs.sd3 import image_projections, stream_groups, text_projections


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
    streams = (
        ("img", image_projections(block), f"{block}.attn.to_out.0"),
        ("txt", text_projections(block), f"{block}.attn.to_add_out"),
    )
    groups: list[LinearGroup] = []
    for stream, projections, attention_out in streams:
        modulation, ff = f"{block}.{stream}_mod.1", f"{block}.{stream}_mlp.net"
        groups += alone(modulation)
        groups += stream_groups(projections, attention_out, (f"{ff}.0.proj",), f"{ff}.2", modulation)
    return groups
