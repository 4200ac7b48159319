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

from collections.abc import Iterable

from torch import nn

from diffusers_dq.specs.base import (
    SPECS,
    LinearGroup,
    ModelSpec,
    ModulatedNorm,
    ModulationArgument,
    TextProjections,
    TimestepRange,
    ValueProjection,
    alone,
    block_names,
)


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


def wan_modulation(block: str, axis: int = -2) -> ModulationArgument:
    """axis: of the argument, where its six chunks lie."""
    return ModulationArgument(block, "temb", chunks=6, table="scale_shift_table", axis=axis)


def wan_spec(
    model: nn.Module,
    modulations: Iterable[ModulationArgument],
    further: Iterable[LinearGroup] = (),
    not_converted: tuple[str, ...] = (),
) -> ModelSpec:
    """modulations: one a block.   further, not_converted: groups and parts of names that not all these models have."""
    modulations = list(modulations)
    picture = model.get_submodule(f"{modulations[0].block}.attn2").add_k_proj is not None
    groups = [group for modulation in modulations for group in _block_groups(modulation, picture)]
    read_once = ["attn2.to_k", "attn2.to_v", *(("attn2.add_k_proj", "attn2.add_v_proj") if picture else ())]
    return ModelSpec(
        groups=(*groups, *further),
        not_converted=("condition_embedder", "proj_out", *read_once, *not_converted),
        timestep=TimestepRange(per_token=True),
        text=TextProjections(
            tuple(f"{modulation.block}.{linear}" for modulation in modulations for linear in read_once),
            ("encoder_hidden_states", *(("encoder_hidden_states_image",) if picture else ())),
        ),
    )


def _block_groups(modulation: ModulationArgument, picture: bool) -> list[LinearGroup]:
    block = modulation.block
    query, key, value = (f"{block}.attn1.to_{letter}" for letter in "qkv")
    text_query, text_key, text_value = (f"{block}.attn2.to_{letter}" for letter in "qkv")
    groups = [
        LinearGroup((query, key, value), ModulatedNorm(modulation, chunks=((0, 1),))),
        LinearGroup((f"{block}.attn1.to_out.0",), ValueProjection(value)),
        LinearGroup((text_query,)),
        LinearGroup((text_key, text_value)),
        LinearGroup((f"{block}.attn2.to_out.0",), None if picture else ValueProjection(text_value)),
        LinearGroup((f"{block}.ffn.net.0.proj",), ModulatedNorm(modulation, chunks=((3, 4),))),
        LinearGroup((f"{block}.ffn.net.2",)),
    ]
    if picture:
        groups.append(LinearGroup((f"{block}.attn2.add_k_proj", f"{block}.attn2.add_v_proj")))
    return groups
