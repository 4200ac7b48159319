# SPDX-License-Identifier: Apache-2.0
"""FLUX.2 (Black Forest Labs, 2025) as diffusers' Flux2Transformer2DModel: blocks of two streams, then of one.

Three linears of the model, without biases, make the modulations of all blocks: of the picture and of the text in
two-stream blocks (shift, scale, gate of the attention, then of the feed-forward), and of one-stream blocks (shift,
scale, gate). Feed-forwards are gated, gate and value from one linear. In one-stream blocks query, key, value and the
feed-forward's two are one linear, and another reads the outputs of attention and feed-forward one after the other.
Pipelines pass t / 1000.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, LinearGroup, ModelSpec, ModulatedNorm, ModulationArgument, TimestepRange
from diffusers_dq.specs.blocks import alone, block_names, image_stream, text_stream

_GATED = ("linear_in", "linear_out")


@SPECS.register("Flux2Transformer2DModel")
def flux2(model: nn.Module) -> ModelSpec:
    joint, single = block_names(model, "transformer_blocks"), block_names(model, "single_transformer_blocks")
    return ModelSpec(
        groups=(
            *(group for block in joint for group in _joint_groups(block)),
            *(group for block in single for group in _single_groups(block)),
        ),
        not_converted=(
            "time_guidance_embed",
            "stream_modulation",
            "context_embedder",
            "x_embedder",
            "norm_out",
            "proj_out",
        ),
        timestep=TimestepRange(noisiest=1),
    )


def _joint_groups(block: str) -> list[LinearGroup]:
    image, text = (ModulationArgument(block, f"temb_mod_{stream}", chunks=6) for stream in ("img", "txt"))
    return [*image_stream(block, image, linears=_GATED), *text_stream(block, text, linears=_GATED)]


def _single_groups(block: str) -> list[LinearGroup]:
    modulation = ModulationArgument(block, "temb_mod", chunks=3)
    return [
        LinearGroup((f"{block}.attn.to_qkv_mlp_proj",), ModulatedNorm(modulation)),
        *alone(f"{block}.attn.to_out"),
    ]
