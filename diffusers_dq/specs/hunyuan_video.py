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

from diffusers_dq.specs.base import SPECS, ModelSpec, TimestepRange
from diffusers_dq.specs.blocks import flux_blocks


@SPECS.register("HunyuanVideoTransformer3DModel")
def hunyuan_video(model: nn.Module) -> ModelSpec:
    groups, modulations = flux_blocks(model)
    return ModelSpec(
        groups=tuple(groups),
        not_converted=("time_text_embed", "context_embedder", "norm_out", "proj_out"),
        weight_only=modulations,
        timestep=TimestepRange(),
    )
