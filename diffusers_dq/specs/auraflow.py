# SPDX-License-Identifier: Apache-2.0
"""AuraFlow (fal, 2024) as diffusers' AuraFlowTransformer2DModel: blocks of two streams, then of one.

Each stream has a modulation linear of its own, as in SD3, but no linear of a block has a bias, and feed-forwards are
gated: `linear_1` and `linear_2` read one input. One-stream blocks attend over text and picture as one sequence, with
one linear for the values, which therefore carries changes of the output's input. Pipelines pass t / 1000.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, LinearGroup, ModelSpec, TimestepRange, alone, block_names
from diffusers_dq.specs.sd3 import image_projections, stream_groups, text_projections


@SPECS.register("AuraFlowTransformer2DModel")
def auraflow(model: nn.Module) -> ModelSpec:
    joint, single = block_names(model, "joint_transformer_blocks"), block_names(model, "single_transformer_blocks")
    groups: list[LinearGroup] = []
    for block in joint:
        groups += [*alone(*_modulations(block)), *_image_groups(block, None), *_text_groups(block)]
    for block in single:
        groups += [*alone(f"{block}.norm1.linear"), *_image_groups(block, f"{block}.attn.to_v")]
    return ModelSpec(
        groups=tuple(groups),
        not_converted=("pos_embed", "time_step_proj", "context_embedder", "norm_out", "proj_out"),
        weight_only=frozenset(
            [linear for block in joint for linear in _modulations(block)]
            + [f"{block}.norm1.linear" for block in single]
        ),
        timestep=TimestepRange(noisiest=1),
    )


def _modulations(block: str) -> tuple[str, str]:
    return f"{block}.norm1.linear", f"{block}.norm1_context.linear"


def _image_groups(block: str, value: str | None) -> list[LinearGroup]:
    ff_in, ff_out = _feed_forward(f"{block}.ff")
    return stream_groups(
        image_projections(block), f"{block}.attn.to_out.0", ff_in, ff_out, f"{block}.norm1.linear", value=value
    )


def _text_groups(block: str) -> list[LinearGroup]:
    ff_in, ff_out = _feed_forward(f"{block}.ff_context")
    return stream_groups(
        text_projections(block), f"{block}.attn.to_add_out", ff_in, ff_out, f"{block}.norm1_context.linear"
    )


def _feed_forward(ff: str) -> tuple[tuple[str, str], str]:
    """What reads its input, and its output."""
    return (f"{ff}.linear_1", f"{ff}.linear_2"), f"{ff}.out_projection"
