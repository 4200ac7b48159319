# SPDX-License-Identifier: Apache-2.0
"""CogVideoX 1.0 and 1.5 (Zhipu AI, 2024) as diffusers' CogVideoXTransformer3DModel: text and video in one sequence.

Attention and feed-forward have a modulation linear each: shift, scale, gate of the video, then of the text. The two
are normalized alike, modulated apart and put one after the other before the same linears read them, so a change of
basis goes into both pairs of chunks. Image-to-video models of 1.5 embed another number ("ofs") beside the timestep.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, LinearGroup, ModelSpec, ModulatedNorm, TimestepRange
from diffusers_dq.specs.blocks import alone, block_names, feed_forward, self_attention

_VIDEO_AND_TEXT = ((0, 1), (3, 4))


@SPECS.register("CogVideoXTransformer3DModel")
def cogvideox(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks")
    left = ("patch_embed", "time_embedding", "norm_out", "proj_out")
    return ModelSpec(
        groups=tuple(group for block in blocks for group in _block_groups(block)),
        not_converted=left if model.ofs_embedding is None else (*left, "ofs_embedding"),
        weight_only=frozenset(f"{block}.{norm}.linear" for block in blocks for norm in ("norm1", "norm2")),
        timestep=TimestepRange(noisiest=999),
    )


def _block_groups(block: str) -> list[LinearGroup]:
    of_attention, of_ff = f"{block}.norm1.linear", f"{block}.norm2.linear"
    return [
        *alone(of_attention, of_ff),
        *self_attention(f"{block}.attn1", ModulatedNorm(of_attention, chunks=_VIDEO_AND_TEXT)),
        *feed_forward(f"{block}.ff", ModulatedNorm(of_ff, chunks=_VIDEO_AND_TEXT)),
    ]
