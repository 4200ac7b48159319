# SPDX-License-Identifier: Apache-2.0
"""Mochi 1 (Genmo, 2024) as diffusers' MochiTransformer3DModel: two streams of different widths, joint attention.

Each stream of a block has a modulation linear of its own: scale and gate of the attention, then of the feed-forward.
There is no shift, so norms carry scales and a shift is made online. Values of the attention come from two linears, one
a stream, and each stream's output reads both: neither carries a change. The last block only reads the text, whose
modulation there is a scale and nothing else. Feed-forwards are gated.

Pipelines pass an inverted schedule: 0 is pure noise and 1000 the video.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, LinearGroup, ModelSpec, ModulatedNorm, TimestepRange
from diffusers_dq.specs.blocks import added_projections, alone, block_names, feed_forward, projections


@SPECS.register("MochiTransformer3DModel")
def mochi(model: nn.Module) -> ModelSpec:
    blocks = {block: model.get_submodule(block) for block in block_names(model, "transformer_blocks")}
    modulations = {block: _modulations(block, module) for block, module in blocks.items()}
    return ModelSpec(
        groups=tuple(group for block, module in blocks.items() for group in _block_groups(block, module)),
        not_converted=("time_embed", "norm_out", "proj_out"),
        weight_only=frozenset(linear for pair in modulations.values() for linear in pair),
        timestep=TimestepRange(noisiest=0, cleanest=1000),
    )


def _modulations(block: str, module: nn.Module) -> tuple[str, str]:
    """Of the video and of the text."""
    return f"{block}.norm1.linear", f"{block}.norm1_context.{'linear_1' if module.context_pre_only else 'linear'}"


def _block_groups(block: str, module: nn.Module) -> list[LinearGroup]:
    video, text = _modulations(block, module)
    groups = [
        *alone(video, text),
        LinearGroup(projections(f"{block}.attn1"), _scaled(video, 0)),
        LinearGroup(added_projections(f"{block}.attn1"), _scaled(text, 0)),
        *alone(f"{block}.attn1.to_out.0"),
        *feed_forward(f"{block}.ff", _scaled(video, 2)),
    ]
    if not module.context_pre_only:
        groups += [*alone(f"{block}.attn1.to_add_out"), *feed_forward(f"{block}.ff_context", _scaled(text, 2))]
    return groups


def _scaled(modulation: str, scale: int) -> ModulatedNorm:
    return ModulatedNorm(modulation, chunks=((None, scale),))
