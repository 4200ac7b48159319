# SPDX-License-Identifier: Apache-2.0
"""LTX-2 (Lightricks, 2025) as diffusers' LTX2VideoTransformer3DModel: a video and an audio stream, adaLN-single.

A block is called with up to eight modulations, each a projection that all blocks share, and adds a table of its own:
- `temb`, `temb_audio`: shift, scale, gate of self-attention, of the feed-forward layer and, from LTX-2.3 on, of the
  queries to the text;
- `temb_ca_scale_shift`, `temb_ca_audio_scale_shift`: *scale, shift* of a stream where it meets the other one, first
  from audio to video, then from video to audio; their tables have a fifth row, for the gate;
- `temb_prompt`, `temb_prompt_audio`, of LTX-2.3: shift, scale of the text; LTX-2.5 has the tables alone;
- two more are gates, which no linear reads.

Where attention is gated (LTX-2.3) the gates are made from the queries' input, so `to_gate_logits` is of its group, and
they multiply the mean of values: a change of what `to_out` reads would have to pass through them, and is made online.
Guidance that skips self-attention is no obstacle: a value alone is a mean of values too. Keys and values of the text
stay in full precision, as in other models, though LTX-2.3 modulates them at each step.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from diffusers_dq.specs.base import (
    SPECS,
    LinearGroup,
    ModelSpec,
    ModulatedNorm,
    ModulationArgument,
    TextProjections,
    TimestepRange,
)
from diffusers_dq.specs.blocks import TEXT_KEY_AND_VALUE, block_names, cross_attention, feed_forward, self_attention


@SPECS.register("LTX2VideoTransformer3DModel")
def ltx2(model: nn.Module) -> ModelSpec:
    config: Any = model.config
    prompt_moves = (config.cross_attn_mod or config.audio_cross_attn_mod) and config.use_prompt_adaln_single
    streams = (
        _Stream("", "", config.gated_attn, config.cross_attn_mod, prompt_moves),
        _Stream("audio_", "_audio", config.audio_gated_attn, config.audio_cross_attn_mod, prompt_moves),
    )
    blocks = block_names(model, "transformer_blocks")
    texts = tuple(f"{block}.{stream.prefix}attn2.to_{name}" for block in blocks for stream in streams for name in "kv")
    return ModelSpec(
        groups=tuple(group for block in blocks for group in _block_groups(block, *streams)),
        not_converted=(
            *("proj_in", "audio_proj_in", "time_embed", "av_cross_attn", "proj_out", "audio_proj_out"),
            *TEXT_KEY_AND_VALUE,
            *(("caption_projection",) if config.use_prompt_embeddings else ()),
            *(("prompt_adaln",) if prompt_moves else ()),
        ),
        timestep=TimestepRange(noisiest=1000, per_token=True),
        text=None
        if prompt_moves
        else TextProjections(texts, ("encoder_hidden_states", "audio_encoder_hidden_states")),
    )


@dataclass(frozen=True)
class _Stream:
    """prefix: of its layers and tables.   suffix: of the modulations it brings.   gated: its queries' attention.
    modulates_queries: those to the text.   modulates_text: at each step anew."""

    prefix: str
    suffix: str
    gated: bool
    modulates_queries: bool
    modulates_text: bool

    def modulation(self, block: str) -> ModulationArgument:
        chunks = 9 if self.modulates_queries else 6
        return ModulationArgument(block, f"temb{self.suffix}", chunks, f"{self.prefix}scale_shift_table")

    def of_text(self, block: str) -> ModulatedNorm | None:
        if not self.modulates_text:
            return None
        table = f"{self.prefix}prompt_scale_shift_table"
        return ModulatedNorm(ModulationArgument(block, f"temb_prompt{self.suffix}", 2, table))

    def meeting(self, block: str, scale: int) -> ModulatedNorm:
        """scale: number of the chunk, before that of the shift."""
        table = f"{self.prefix or 'video_'}a2v_cross_attn_scale_shift_table"
        source = ModulationArgument(block, f"temb_ca{self.suffix}_scale_shift", 4, table)
        return ModulatedNorm(source, chunks=((scale + 1, scale),))


def _block_groups(block: str, video: _Stream, audio: _Stream) -> list[LinearGroup]:
    to_video, to_audio = f"{block}.audio_to_video_attn", f"{block}.video_to_audio_attn"
    return [
        *(group for stream in (video, audio) for group in _stream_groups(block, stream)),
        *_meeting_groups(to_video, video.meeting(block, 0), audio.meeting(block, 0), video.gated),
        *_meeting_groups(to_audio, audio.meeting(block, 2), video.meeting(block, 2), audio.gated),
    ]


def _stream_groups(block: str, stream: _Stream) -> list[LinearGroup]:
    """Self-attention, cross-attention to the text and feed-forward layer."""
    prefix, modulation = f"{block}.{stream.prefix}", stream.modulation(block)
    to_text = ModulatedNorm(modulation, chunks=((6, 7),)) if stream.modulates_queries else None
    return [
        *self_attention(
            f"{prefix}attn1", ModulatedNorm(modulation), beside=_gates(stream.gated), carries=not stream.gated
        ),
        *_meeting_groups(f"{prefix}attn2", to_text, stream.of_text(block), stream.gated),
        *feed_forward(f"{prefix}ff", ModulatedNorm(modulation, chunks=((3, 4),))),
    ]


def _meeting_groups(
    attention: str, of_query: ModulatedNorm | None, of_value: ModulatedNorm | None, gated: bool
) -> list[LinearGroup]:
    return cross_attention(attention, of_query, of_value, beside_query=_gates(gated), carries=not gated)


def _gates(gated: bool) -> tuple[str, ...]:
    return ("to_gate_logits",) if gated else ()
