# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo (Tencent, 2024) as diffusers' HunyuanVideoTransformer3DModel: blocks of two streams, then of one.

Blocks of two streams are those of SD3 and FLUX.1. Blocks of one have one norm, with one modulation linear, for
attention and feed-forward side by side; the attention cuts what it reads in video and text and puts them together
again, another tensor of the same values.
Image-to-video models that replace the tokens of the first frame run the modulation linears of the video a second time,
at step 0 for those tokens; a change of its rows reaches both. Text goes through a small transformer of its own, the
context embedder, a few hundred tokens: it stays in full precision.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, LinearGroup, ModelSpec, TimestepRange, alone, block_names
from diffusers_dq.specs.flux import joint_groups, single_groups


@SPECS.register("HunyuanVideoTransformer3DModel")
def hunyuan_video(model: nn.Module) -> ModelSpec:
    joint, single = block_names(model, "transformer_blocks"), block_names(model, "single_transformer_blocks")
    groups: list[LinearGroup] = []
    for block in joint:
        video, text = f"{block}.norm1.linear", f"{block}.norm1_context.linear"
        groups += [*alone(video, text), *joint_groups(block, video, text)]
    for block in single:
        groups += [*alone(f"{block}.norm.linear"), *single_groups(block, f"{block}.norm.linear")]
    return ModelSpec(
        groups=tuple(groups),
        not_converted=("time_text_embed", "context_embedder", "norm_out", "proj_out"),
        weight_only=frozenset(
            [f"{block}.{norm}.linear" for block in joint for norm in ("norm1", "norm1_context")]
            + [f"{block}.norm.linear" for block in single]
        ),
        timestep=TimestepRange(),
    )
