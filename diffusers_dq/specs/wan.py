# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1 and 2.2 (Alibaba, 2025) as diffusers' WanTransformer3DModel, and VACE, which adds blocks for control frames.

One projection of the timestep serves all blocks, which add `scale_shift_table` to it: shift, scale, gate of the
self-attention, then of the feed-forward; of a sample, [B, 6, C], or of a token, [B, S, 6, C], where the frames of a
video are at different steps (Wan 2.2 5B). Cross-attention reads a LayerNorm with weights of its own, which does not
carry a change yet. Image-to-video models of 2.1 add to it an attention over tokens of a picture, whose values come
from another linear: then its output carries none either. Keys and values of text and picture do not change with the
timestep and their input is a few hundred tokens: they stay in full precision.

Wan 2.2 A14B has two of these models, one for each end of the schedule; this is about one of them.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, ModelSpec
from diffusers_dq.specs.blocks import alone, block_names, wan_modulation, wan_spec


@SPECS.register("WanTransformer3DModel")
def wan(model: nn.Module) -> ModelSpec:
    return wan_spec(model, [wan_modulation(block) for block in block_names(model, "blocks")])


@SPECS.register("WanVACETransformer3DModel")
def wan_vace(model: nn.Module) -> ModelSpec:
    """Blocks of the control frames have a projection on the way out, the first of them also one on the way in."""
    control = block_names(model, "vace_blocks")
    ends = [f"{block}.proj_out" for block in control]
    modulations = [wan_modulation(block) for block in (*block_names(model, "blocks"), *control)]
    return wan_spec(model, modulations, alone(f"{control[0]}.proj_in", *ends))
