# SPDX-License-Identifier: Apache-2.0
"""Z-Image (Z-Image team, 2025) as diffusers' ZImageTransformer2DModel: norms that are scaled, never shifted.

As in Lumina-Image 2.0, but for names and for attention, where each query head has a value head of its own. Context and
SigLIP refiners have plain norms; they stay in full precision, as text does elsewhere: prompts are padded to a multiple
of 32, and statistics of short ones know little but the padding. With reference images ("omni") the modulation linear
runs twice, for noisy and for clean tokens; the change that it carries is the same for both.
"""

from torch import nn

from diffusers_dq.specs.base import SPECS, ModelSpec, TimestepRange
from diffusers_dq.specs.blocks import block_names, scaled_block


@SPECS.register("ZImageTransformer2DModel")
def z_image(model: nn.Module) -> ModelSpec:
    """Timesteps grow from 0, noise, to 1."""
    siglip = model.siglip_embedder is not None
    refiners = ("noise_refiner", "context_refiner", *(("siglip_refiner",) if siglip else ()))
    modulations = {
        block: f"{block}.adaLN_modulation.0" if model.get_submodule(block).modulation else None
        for block in block_names(model, *refiners, "layers")
    }
    feed_forward = ("w1", "w3", "w2")
    return ModelSpec(
        groups=tuple(
            group
            for block, modulation in modulations.items()
            for group in scaled_block(block, "attention", feed_forward, modulation, own_values=True)
        ),
        not_converted=(
            *("all_x_embedder", "t_embedder", "cap_embedder", "context_refiner", "all_final_layer"),
            *(("siglip_embedder", "siglip_refiner") if siglip else ()),
        ),
        weight_only=frozenset(filter(None, modulations.values())),
        timestep=TimestepRange("t", noisiest=0, cleanest=1),
    )
