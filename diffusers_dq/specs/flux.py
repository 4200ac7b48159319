# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 (Black Forest Labs, 2024) as diffusers' FluxTransformer2DModel: blocks of two streams, then of one.

The first kind is that of SD3. The second reads text and picture as one sequence and runs attention and feed-forward
side by side, on one norm with one modulation linear (shift, scale, gate); one linear reads the outputs of both one
after the other, and no change of basis goes through the feed-forward's GELU. Guidance-distilled models embed the
guidance scale beside the timestep. Pipelines pass t / 1000.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, ModelSpec, TimestepRange
from diffusers_dq.specs.blocks import flux_blocks


@SPECS.register("FluxTransformer2DModel")
def flux(model: nn.Module) -> ModelSpec:
    groups, modulations = flux_blocks(model)
    return ModelSpec(
        groups=tuple(groups),
        not_converted=("time_text_embed", "context_embedder", "x_embedder", "norm_out", "proj_out"),
        weight_only=modulations,
        timestep=TimestepRange(noisiest=1),
    )
