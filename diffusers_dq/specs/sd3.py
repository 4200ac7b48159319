# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5 (Esser et al., 2024) as diffusers' SD3Transformer2DModel: two streams, joint attention.

Each stream of a block has a modulation linear of its own: shift, scale, gate of the attention, then of the
feed-forward; in blocks with a second self-attention of the picture (3.5 medium) three more for it. The last block lets
go of the text after the attention: its modulation of the text is only scale and shift, in this order.
Values of a joint attention come from two linears, one a stream, and each stream's output reads both: a change of basis
would have to be the same in both outputs, so neither carries one. The second self-attention has one.
"""

from torch import nn

from diffusers_dq.specs.base import (
    SPECS,
    LinearGroup,
    ModelSpec,
    ModulatedNorm,
    Source,
    TimestepRange,
    ValueProjection,
    alone,
    block_names,
)


@SPECS.register("SD3Transformer2DModel")
def sd3(model: nn.Module) -> ModelSpec:
    blocks = block_names(model, "transformer_blocks")
    modulations = [f"{block}.{norm}.linear" for block in blocks for norm in ("norm1", "norm1_context")]
    return ModelSpec(
        groups=tuple(group for block in blocks for group in _block_groups(block, model.get_submodule(block))),
        not_converted=("time_text_embed", "context_embedder", "norm_out", "proj_out"),
        weight_only=frozenset(modulations),
        timestep=TimestepRange(),
    )


def _block_groups(block: str, module: nn.Module) -> list[LinearGroup]:
    image, text = f"{block}.norm1.linear", f"{block}.norm1_context.linear"
    groups = [
        *alone(image, text),
        *stream_groups(
            image_projections(block),
            f"{block}.attn.to_out.0",
            (f"{block}.ff.net.0.proj",),
            f"{block}.ff.net.2",
            image,
        ),
    ]
    if module.attn2 is not None:
        query, key, value = (f"{block}.attn2.to_{letter}" for letter in "qkv")
        groups.append(LinearGroup((query, key, value), ModulatedNorm(image, chunks=((6, 7),))))
        groups.append(LinearGroup((f"{block}.attn2.to_out.0",), ValueProjection(value)))
    if module.context_pre_only:
        return [*groups, LinearGroup(text_projections(block), ModulatedNorm(text, chunks=((1, 0),)))]
    return [*groups, *text_stream_groups(block, text)]


def image_projections(block: str) -> tuple[str, ...]:
    return tuple(f"{block}.attn.to_{letter}" for letter in "qkv")


def text_projections(block: str) -> tuple[str, ...]:
    return tuple(f"{block}.attn.add_{letter}_proj" for letter in "qkv")


def text_stream_groups(block: str, modulation: Source, first: int = 0) -> list[LinearGroup]:
    """Of a stream whose linears are called "context" or "add", its feed-forward a FeedForward."""
    return stream_groups(
        text_projections(block),
        f"{block}.attn.to_add_out",
        (f"{block}.ff_context.net.0.proj",),
        f"{block}.ff_context.net.2",
        modulation,
        first,
    )


def stream_groups(
    projections: tuple[str, ...],
    attention_out: str,
    ff_in: tuple[str, ...],
    ff_out: str,
    modulation: Source,
    first: int = 0,
    value: str | None = None,
) -> list[LinearGroup]:
    """Of one stream of a block: its projections to query, key and value, what follows, and its feed-forward.

    modulation: six chunks of it, from number `first` on, are shift, scale, gate of the attention, then of the
        feed-forward.   value: the linear of the only values that `attention_out` reads, where there is one.
    """
    return [
        LinearGroup(projections, ModulatedNorm(modulation, chunks=((first, first + 1),))),
        LinearGroup((attention_out,), None if value is None else ValueProjection(value)),
        LinearGroup(ff_in, ModulatedNorm(modulation, chunks=((first + 3, first + 4),))),
        LinearGroup((ff_out,)),
    ]
