# SPDX-License-Identifier: Apache-2.0
"""SkyReels-V2 (Skywork, 2025) as diffusers' SkyReelsV2Transformer3DModel: Wan 2.1's blocks, some with frame rates.

Diffusion forcing gives each frame a step of its own: blocks are then called with [B, 6, S, C], six chunks before the
tokens, where Wan's has them after. What embeds the frame rate adds to the modulation of all blocks.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, ModelSpec
from diffusers_dq.specs.blocks import block_names, wan_modulation, wan_spec


@SPECS.register("SkyReelsV2Transformer3DModel")
def skyreels(model: nn.Module) -> ModelSpec:
    frame_rate = ("fps_projection",) if hasattr(model, "fps_projection") else ()
    modulations = [wan_modulation(block, axis=1) for block in block_names(model, "blocks")]
    return wan_spec(model, modulations, not_converted=frame_rate)
