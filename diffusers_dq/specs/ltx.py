# SPDX-License-Identifier: Apache-2.0
"""LTX-Video (HaCohen et al., 2024) as diffusers' LTXVideoTransformer3DModel: adaLN-single over RMS norms.

The block names its linears as PixArt's does; `temb` brings the modulation, one a sample, or one a token where frames
are given: those are at timestep 0 while the others are denoised.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, ModelSpec, TimestepRange
from diffusers_dq.specs.blocks import TEXT_KEY_AND_VALUE, adaln_single_block, block_names, text_projections


@SPECS.register("LTXVideoTransformer3DModel")
def ltx(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks")
    return ModelSpec(
        groups=tuple(group for block in blocks for group in adaln_single_block(block, "temb")),
        not_converted=("proj_in", "time_embed", "caption_projection", "proj_out", *TEXT_KEY_AND_VALUE),
        timestep=TimestepRange(noisiest=1000, per_token=True),
        text=text_projections(blocks),
    )
