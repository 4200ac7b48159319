# SPDX-License-Identifier: Apache-2.0
"""What architectures have in common, as groups of linears: attention, feed-forward layers, whole blocks.

A spec imports this and base.py, never another spec. Linears go by the names that most of diffusers' models give them.
"""

from collections.abc import Iterable

from torch import nn

from diffusers_dq.specs.base import (
    LinearGroup,
    ModelSpec,
    ModulatedNorm,
    ModulationArgument,
    Producer,
    Source,
    TextProjections,
    TimestepRange,
    ValueProjection,
)

TEXT_KEY_AND_VALUE = ("attn2.to_k", "attn2.to_v")  # of a block with cross-attention to the text
_FEED_FORWARD = ("net.0.proj", "net.2")  # of diffusers' FeedForward


def block_names(model: nn.Module, *lists: str) -> list[str]:
    """Of all blocks of these ModuleLists of the model."""
    return [f"{name}.{i}" for name in lists for i in range(len(getattr(model, name)))]


def alone(*linears: str) -> Iterable[LinearGroup]:
    """Linears that share their input with no other, and whose input nothing can carry a change of."""
    return (LinearGroup((linear,)) for linear in linears)


# Attention and feed-forward


def projections(attention: str) -> tuple[str, str, str]:
    """To query, key and value."""
    return f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v"


def added_projections(attention: str) -> tuple[str, ...]:
    """To query, key and value of a joint attention's second stream."""
    return tuple(f"{attention}.add_{letter}_proj" for letter in "qkv")


def self_attention(
    attention: str,
    norm: Producer | None = None,
    *,
    beside: Iterable[str] = (),
    carries: bool = True,
    out: str = "to_out.0",
) -> list[LinearGroup]:
    """norm: what puts out the input of query, key and value, and of the attention's further linears `beside` them.
    carries: whether the output's input is a mean of these values and no others."""
    query, key, value = projections(attention)
    further = (f"{attention}.{name}" for name in beside)
    return [LinearGroup((query, key, value, *further), norm), _output(attention, carries, out)]


def cross_attention(
    attention: str,
    of_query: Producer | None = None,
    of_value: Producer | None = None,
    *,
    beside_query: Iterable[str] = (),
    carries: bool = True,
) -> list[LinearGroup]:
    """Between two sequences; the arguments as in `self_attention`."""
    query, key, value = projections(attention)
    further = (f"{attention}.{name}" for name in beside_query)
    return [
        LinearGroup((query, *further), of_query),
        LinearGroup((key, value), of_value),
        _output(attention, carries),
    ]


def _output(attention: str, carries: bool, out: str = "to_out.0") -> LinearGroup:
    return LinearGroup((f"{attention}.{out}",), ValueProjection(f"{attention}.to_v") if carries else None)


def feed_forward(
    layer: str, norm: Producer | None = None, linears: tuple[str, ...] = _FEED_FORWARD
) -> list[LinearGroup]:
    """linears: those that read what `norm` puts out, and last the one that puts out the layer's output."""
    *into, out = (f"{layer}.{name}" for name in linears)
    return [LinearGroup(tuple(into), norm), LinearGroup((out,))]


def text_projections(
    blocks: Iterable[str],
    linears: Iterable[str] = TEXT_KEY_AND_VALUE,
    arguments: tuple[str, ...] = ("encoder_hidden_states",),
) -> TextProjections:
    """linears: of each block."""
    return TextProjections(tuple(f"{block}.{linear}" for block in blocks for linear in linears), arguments)


# adaLN-single: one modulation for all blocks


def adaln_single_block(block: str, argument: str = "timestep", reads_text: bool = True) -> list[LinearGroup]:
    """PixArt's: a BasicTransformerBlock with "ada_norm_single", and blocks that name their layers alike.

    argument: of the block's forward, that brings the modulation.   reads_text: whether it has cross-attention.
    """
    modulation = ModulationArgument(block, argument, chunks=6, table="scale_shift_table")
    return [
        *self_attention(f"{block}.attn1", ModulatedNorm(modulation)),
        *(cross_attention(f"{block}.attn2") if reads_text else ()),
        *feed_forward(f"{block}.ff", ModulatedNorm(modulation, chunks=((3, 4),))),
    ]


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
    blocks = [modulation.block for modulation in modulations]
    picture = model.get_submodule(f"{blocks[0]}.attn2").add_k_proj is not None
    of_picture = ("attn2.add_k_proj", "attn2.add_v_proj") if picture else ()
    groups: list[LinearGroup] = []
    for block, modulation in zip(blocks, modulations, strict=True):
        groups += self_attention(f"{block}.attn1", ModulatedNorm(modulation))
        groups += cross_attention(f"{block}.attn2", carries=not picture)
        groups += feed_forward(f"{block}.ffn", ModulatedNorm(modulation, chunks=((3, 4),)))
        if picture:
            groups.append(LinearGroup(tuple(f"{block}.{linear}" for linear in of_picture)))
    read_once = (*TEXT_KEY_AND_VALUE, *of_picture)
    arguments = ("encoder_hidden_states", *(("encoder_hidden_states_image",) if picture else ()))
    return ModelSpec(
        groups=(*groups, *further),
        not_converted=("condition_embedder", "proj_out", *read_once, *not_converted),
        timestep=TimestepRange(per_token=True),
        text=text_projections(blocks, read_once, arguments),
    )


# Two streams with joint attention, whose values come from two linears: no output carries a change


def image_stream(
    block: str, modulation: Source, ff: str = "ff", linears: tuple[str, ...] = _FEED_FORWARD
) -> list[LinearGroup]:
    """modulation: shift, scale, gate of the attention, then of the feed-forward.   ff, linears: its feed-forward."""
    return [
        *self_attention(f"{block}.attn", ModulatedNorm(modulation), carries=False),
        *feed_forward(f"{block}.{ff}", ModulatedNorm(modulation, chunks=((3, 4),)), linears),
    ]


def text_stream(
    block: str,
    modulation: Source,
    ff: str = "ff_context",
    linears: tuple[str, ...] = _FEED_FORWARD,
    first: int = 0,
) -> list[LinearGroup]:
    """As `image_stream`.   first: number of the modulation's first chunk that is the text's."""
    of_attention, of_ff = ((first, first + 1),), ((first + 3, first + 4),)
    return [
        LinearGroup(added_projections(f"{block}.attn"), ModulatedNorm(modulation, chunks=of_attention)),
        *alone(f"{block}.attn.to_add_out"),
        *feed_forward(f"{block}.{ff}", ModulatedNorm(modulation, chunks=of_ff), linears),
    ]


def parallel_block(block: str, modulation: Source) -> list[LinearGroup]:
    """FLUX.1's of one stream: attention and feed-forward side by side on one norm, and one linear that reads both."""
    readers = (*projections(f"{block}.attn"), f"{block}.proj_mlp")
    return [LinearGroup(readers, ModulatedNorm(modulation)), *alone(f"{block}.proj_out")]


def flux_blocks(model: nn.Module) -> tuple[list[LinearGroup], frozenset[str]]:
    """FLUX.1's blocks of two streams, then of one, and their modulation linears: one a norm."""
    groups: list[LinearGroup] = []
    modulations: list[str] = []
    for block in block_names(model, "transformer_blocks"):
        image, text = f"{block}.norm1.linear", f"{block}.norm1_context.linear"
        groups += [*alone(image, text), *image_stream(block, image), *text_stream(block, text)]
        modulations += [image, text]
    for block in block_names(model, "single_transformer_blocks"):
        modulation = f"{block}.norm.linear"
        groups += [*alone(modulation), *parallel_block(block, modulation)]
        modulations.append(modulation)
    return groups, frozenset(modulations)


# Norms that are scaled, never shifted


def scaled_block(
    block: str, attention: str, linears: tuple[str, str, str], modulation: str | None, own_values: bool
) -> list[LinearGroup]:
    """Lumina's, with self-attention and a gated feed-forward layer.

    attention, linears: their names in the block, of the feed-forward layer those of gate, up and down projections.
    modulation: the linear that emits scale, gate, scale, gate; None where norms are plain.
    own_values: whether each query head has a value head of its own.
    """
    norms = [None if modulation is None else ModulatedNorm(modulation, chunks=((None, scale),)) for scale in (0, 2)]
    return [
        *(() if modulation is None else alone(modulation)),
        *self_attention(f"{block}.{attention}", norms[0], carries=own_values),
        *feed_forward(f"{block}.feed_forward", norms[1], linears),
    ]
