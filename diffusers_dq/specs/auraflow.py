# SPDX-License-Identifier: Apache-2.0
"""AuraFlow (fal, 2024) as diffusers' AuraFlowTransformer2DModel: blocks of two streams, then of one.

Each stream has a modulation linear of its own, as in SD3, but no linear of a block has a bias, and feed-forwards are
gated: `linear_1` and `linear_2` read one input. One-stream blocks attend over text and picture as one sequence, with
one linear for the values, which therefore carries changes of the output's input. Pipelines pass t / 1000.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, LinearGroup, ModelSpec, ModulatedNorm, TimestepRange
from diffusers_dq.specs.blocks import alone, block_names, feed_forward, image_stream, self_attention, text_stream

_GATED = ("linear_1", "linear_2", "out_projection")


@SPECS.register("AuraFlowTransformer2DModel")
def auraflow(model: nn.Module) -> ModelSpec:
    groups: list[LinearGroup] = []
    modulations: list[str] = []
    for block in block_names(model, "joint_transformer_blocks"):
        image, text = f"{block}.norm1.linear", f"{block}.norm1_context.linear"
        groups += alone(image, text)
        groups += [*image_stream(block, image, linears=_GATED), *text_stream(block, text, linears=_GATED)]
        modulations += [image, text]
    for block in block_names(model, "single_transformer_blocks"):
        modulation = f"{block}.norm1.linear"
        groups += [*alone(modulation), *self_attention(f"{block}.attn", ModulatedNorm(modulation))]
        groups += feed_forward(f"{block}.ff", ModulatedNorm(modulation, chunks=((3, 4),)), _GATED)
        modulations.append(modulation)
    return ModelSpec(
        groups=tuple(groups),
        not_converted=("pos_embed", "time_step_proj", "context_embedder", "norm_out", "proj_out"),
        weight_only=frozenset(modulations),
        timestep=TimestepRange(noisiest=1),
    )
