# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 (Black Forest Labs, 2024) as diffusers' FluxTransformer2DModel: blocks of two streams, then of one.

The first kind is that of SD3. The second reads text and picture as one sequence and runs attention and feed-forward
side by side, on one norm with one modulation linear (shift, scale, gate); one linear reads the outputs of both one
after the other, and no change of basis goes through the feed-forward's GELU. Guidance-distilled models embed the
guidance scale beside the timestep. Pipelines pass t / 1000.
"""

from torch import nn

from diffusers_dq.specs.base import (
    SPECS,
    LinearGroup,
    ModelSpec,
    ModulatedNorm,
    Source,
    TimestepRange,
    alone,
    block_names,
)
from diffusers_dq.specs.sd3 import image_projections, stream_groups, text_stream_groups


@SPECS.register("FluxTransformer2DModel")
def flux(model: nn.Module) -> ModelSpec:
    joint, single = block_names(model, "transformer_blocks"), block_names(model, "single_transformer_blocks")
    groups: list[LinearGroup] = []
    for block in joint:
        image, text = f"{block}.norm1.linear", f"{block}.norm1_context.linear"
        groups += [*alone(image, text), *joint_groups(block, image, text)]
    for block in single:
        modulation = f"{block}.norm.linear"
        groups += [*alone(modulation), *single_groups(block, modulation)]
    return ModelSpec(
        groups=tuple(groups),
        not_converted=("time_text_embed", "context_embedder", "x_embedder", "norm_out", "proj_out"),
        weight_only=frozenset(
            [f"{block}.{norm}.linear" for block in joint for norm in ("norm1", "norm1_context")]
            + [f"{block}.norm.linear" for block in single]
        ),
        timestep=TimestepRange(noisiest=1),
    )


def joint_groups(block: str, image: Source, text: Source, first_of_text: int = 0) -> list[LinearGroup]:
    """image, text: modulations of the streams.   first_of_text: the first chunk that is the text's."""
    image_groups = stream_groups(
        image_projections(block), f"{block}.attn.to_out.0", (f"{block}.ff.net.0.proj",), f"{block}.ff.net.2", image
    )
    return [*image_groups, *text_stream_groups(block, text, first_of_text)]


def single_groups(block: str, modulation: Source) -> list[LinearGroup]:
    return [
        LinearGroup((*image_projections(block), f"{block}.proj_mlp"), ModulatedNorm(modulation)),
        LinearGroup((f"{block}.proj_out",)),
    ]
