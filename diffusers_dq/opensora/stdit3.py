# SPDX-License-Identifier: Apache-2.0
"""STDiT3, the transformer of Open-Sora 1.2: whole blocks within frames and over frames in turn, any size and length.

Notation: B batch, T frames, S patches of a frame, C width, D head width, L caption tokens.
"""

import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from diffusers_dq.opensora.embeddings import (
    AdaLayerNormSingleFps,
    CaptionProjection,
    VideoPatchEmbed,
    coordinates,
    key_mask,
    per_sample,
    spatial_positions,
    unpatchify,
)
from diffusers_dq.opensora.stdit import check_width

Rotation = tuple[Tensor, Tensor]


class RotaryAttnProcessor:
    """Self-attention whose query and key are normalised by head, then turned by their position."""

    def __call__(self, attn: Any, hidden_states: Tensor, rotation: Rotation, **_: Any) -> Tensor:
        """hidden_states: [n, N, C].   rotation: cosines and sines, [N, D] each."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [n, heads, N, D]
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        output = F.scaled_dot_product_attention(rotate(query, rotation), rotate(key, rotation), value)
        projected: Tensor = attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2)))
        return projected


def rotation_of(frames: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Rotation:
    """Angles t 10000^(-2 i / D) for channels 2 i and 2 i + 1: their cosines and sines, [T, D] each, fp32 or wider."""
    positions = coordinates(frames, 1.0, device)
    exponents = torch.arange(0, head_dim, 2, dtype=positions.dtype, device=device) / head_dim
    angles = (positions[:, None] * 10000.0**-exponents).repeat_interleave(2, dim=-1)
    wide = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(wide), angles.sin().to(wide)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Each pair of neighbouring channels turned by its angle, in fp32 or wider; diffusers' own narrows fp64 to fp32.

    x: [n, heads, N, D].   rotation: cosines and sines, [N, D] each.
    """
    cos, sin = rotation
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    quarter_turn = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x * cos + quarter_turn * sin).to(x.dtype)


class STDiT3Block(nn.Module):
    """Modulated self-attention, attention to the caption (without norm or gate), modulated MLP.

    temporal: attention is over frames, with rotary positions, else within each frame.
    """

    def __init__(self, channels: int, heads: int, mlp_ratio: float, qk_norm: bool, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        head = {"heads": heads, "dim_head": channels // heads, "bias": True}
        self.norm1 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.attn1 = Attention(channels, processor=RotaryAttnProcessor() if temporal else None, **head)
        if qk_norm:  # torch's, as diffusers' own works out the variance in fp32 whatever it is given
            self.attn1.norm_q = nn.RMSNorm(channels // heads, eps=1e-6)
            self.attn1.norm_k = nn.RMSNorm(channels // heads, eps=1e-6)
        self.attn2 = Attention(channels, cross_attention_dim=channels, **head)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(channels, mult=mlp_ratio, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.randn(6, channels) / channels**0.5)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        timestep: Tensor,
        frames: int,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """hidden_states: [B, T S, C].   encoder_hidden_states: [B, L, C].   encoder_attention_mask: bool [B, 1, L].

        timestep: [B, 1 or T, 6 C], of all frames or of each, to which the block adds its table: shift, scale, gate of
        attention, then of the MLP.
        """
        modulation = (self.scale_shift_table + timestep.unflatten(-1, (6, -1))).unsqueeze(-2)  # [B, T, 6, S, C]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(2)
        x = self.norm1(hidden_states).unflatten(1, (frames, -1)) * (1 + scale_msa) + shift_msa  # [B, T, S, C]
        if self.temporal:
            x = self.attn1(x.transpose(1, 2).flatten(0, 1), rotation=rotation)  # [B S, T, C]
            x = x.unflatten(0, (len(hidden_states), -1)).transpose(1, 2)
        else:
            x = self.attn1(x.flatten(0, 1)).unflatten(0, (-1, frames))
        hidden_states = hidden_states + (gate_msa * x).flatten(1, 2)

        hidden_states = hidden_states + self.attn2(hidden_states, encoder_hidden_states, encoder_attention_mask)

        x = self.norm2(hidden_states).unflatten(1, (frames, -1)) * (1 + scale_mlp) + shift_mlp
        x = self.ff(x.flatten(1, 2)).unflatten(1, (frames, -1))
        return hidden_states + (gate_mlp * x).flatten(1, 2)


class STDiT3Transformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """STDiT3 (Open-Sora 1.2). Defaults are those of the published STDiT3-XL/2, hpcai-tech/OpenSora-STDiT-v3.

    num_layers: of blocks within frames and of blocks over frames, each.   out_channels: twice in_channels; the first
    half is the velocity, the other is not used in sampling.
    sample_size: pixels, square root of height times width, at which neighbouring patches are one position apart.
    caption_length: tokens of `caption_projection.y_embedding`, the learned caption that stands for none.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["STDiT3Block"]
    _repeated_blocks = ["STDiT3Block"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "adaln_single"]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        caption_length: int = 300,
        qk_norm: bool = True,
        sample_size: int = 512,
    ) -> None:
        super().__init__()
        channels = num_attention_heads * attention_head_dim
        check_width(channels)
        patch_size = tuple(patch_size)  # type: ignore[assignment]  # a list, from config.json
        self.pos_embed = VideoPatchEmbed(in_channels, channels, patch_size)
        self.adaln_single = AdaLayerNormSingleFps(channels)
        self.caption_projection = CaptionProjection(caption_channels, channels, caption_length)
        self.transformer_blocks, self.temporal_transformer_blocks = (
            nn.ModuleList(
                STDiT3Block(channels, num_attention_heads, mlp_ratio, qk_norm, temporal) for _ in range(num_layers)
            )
            for temporal in (False, True)
        )
        self.norm_out = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, channels) / channels**0.5)
        self.proj_out = nn.Linear(channels, patch_size[0] * patch_size[1] * patch_size[2] * out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        fps: Tensor | float = 24.0,
        height: float | None = None,
        width: float | None = None,
        frame_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """hidden_states: [B, in_channels, frames, height, width] of the latents.   timestep: one number or [B], 0 to
        1000, in fp32: bf16 would round it.   encoder_hidden_states: [B, L, caption_channels].
        encoder_attention_mask: [B, L], nonzero where a token counts; at least one a row.
        fps: frames a second, one number or [B]; single pictures were trained with 120.
        height, width: of the video in pixels, the same for the whole batch; 8 times the latents' if None.
        frame_mask: bool [B, T]; False where a frame is given and not denoised: its modulation is that of timestep 0.

        Returns Transformer2DModelOutput(sample), or (sample,): [B, out_channels, frames, height, width], in the dtype
        of `hidden_states`.
        """
        dtype, device, batch = self.pos_embed.proj.weight.dtype, hidden_states.device, len(hidden_states)
        size = tuple(hidden_states.shape[2:])
        x, grid = self.pos_embed(hidden_states.to(dtype))  # [B, T, S, C]
        frames = grid[0]
        x = x + self._positions(grid, height or 8 * size[1], width or 8 * size[2], device).to(dtype)
        x = x.flatten(1, 2)

        timestep = per_sample("timestep", timestep, batch, device)
        fps = per_sample("fps", fps, batch, device)
        modulation, embedded = (of_all[:, None] for of_all in self.adaln_single(timestep, fps, dtype))
        if frame_mask is not None:
            if frame_mask.shape != (batch, frames):
                raise ValueError(f"frame_mask must have shape {[batch, frames]}, got {list(frame_mask.shape)}")
            denoised = frame_mask.bool()[..., None]
            given = self.adaln_single(torch.zeros_like(timestep), fps, dtype)
            modulation = torch.where(denoised, modulation, given[0][:, None])  # [B, T, 6 C]
            embedded = torch.where(denoised, embedded, given[1][:, None])

        mask = key_mask(encoder_attention_mask, encoder_hidden_states)
        caption = self.caption_projection(encoder_hidden_states.to(dtype))
        rotation = rotation_of(frames, self.config.attention_head_dim, device, dtype)
        for pair in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            for block in pair:
                x = block(
                    x,
                    encoder_hidden_states=caption,
                    encoder_attention_mask=mask,
                    timestep=modulation,
                    frames=frames,
                    rotation=rotation if block.temporal else None,
                )

        shift, scale = (self.scale_shift_table + embedded[:, :, None]).unsqueeze(-2).unbind(2)
        x = self.norm_out(x).unflatten(1, (frames, -1)) * (1 + scale) + shift
        x = self.proj_out(x.flatten(1, 2))
        sample = unpatchify(x, grid, self.pos_embed.patch_size, size).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _positions(self, grid: tuple[int, int, int], height: float, width: float, device: torch.device) -> Tensor:
        """[S, C]: the grid is stretched to a square of round(sqrt(S)) patches, then scaled by the video's size."""
        _, rows, columns = grid
        scale = math.sqrt(height * width) / self.config.sample_size
        side = round(math.sqrt(rows * columns))
        channels = self.config.num_attention_heads * self.config.attention_head_dim
        return spatial_positions(
            channels,
            coordinates(rows, side / rows / scale, device),
            coordinates(columns, side / columns / scale, device),
        )
