# SPDX-License-Identifier: Apache-2.0
"""STDiT, the transformer of Open-Sora 1.0: attention in each frame, then over frames, then to the caption.

Notation: B batch, T frames, S patches of a frame, C width, L caption tokens.
"""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

from diffusers_dq.opensora.embeddings import (
    CaptionProjection,
    VideoPatchEmbed,
    coordinates,
    key_mask,
    per_sample,
    sincos,
    spatial_positions,
    unpatchify,
)


class STDiTBlock(nn.Module):
    """Modulated attention in each frame, then attention over frames and to the caption, both of the residual as it is
    (neither a norm nor a modulation, and the gate of the first serves the second), then a modulated MLP."""

    def __init__(self, channels: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        head = {"heads": heads, "dim_head": channels // heads, "bias": True}
        self.norm1 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.attn1 = Attention(channels, **head)
        self.attn_temporal = Attention(channels, **head)
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
        temporal_positions: Tensor | None = None,
    ) -> Tensor:
        """hidden_states: [B, T S, C].   encoder_hidden_states: [B, L, C].   encoder_attention_mask: bool [B, 1, L].

        timestep: [B, 6 C], to which the block adds its table: shift, scale, gate of attention, then of the MLP.
        temporal_positions: [T, C], added to what attention over frames reads, not to the residual.
        """
        batch = len(hidden_states)
        modulation = self.scale_shift_table[None] + timestep.reshape(batch, 6, -1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)  # [B, 1, C]

        x = self.norm1(hidden_states) * (1 + scale_msa) + shift_msa
        x = self.attn1(x.unflatten(1, (frames, -1)).flatten(0, 1))  # [B T, S, C]
        hidden_states = hidden_states + gate_msa * x.reshape(hidden_states.shape)

        x = hidden_states.unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)  # [B S, T, C]
        x = self.attn_temporal(x if temporal_positions is None else x + temporal_positions)
        x = x.unflatten(0, (batch, -1)).transpose(1, 2).reshape(hidden_states.shape)
        hidden_states = hidden_states + gate_msa * x

        hidden_states = hidden_states + self.attn2(hidden_states, encoder_hidden_states, encoder_attention_mask)

        x = self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp
        return hidden_states + gate_mlp * self.ff(x)


class STDiTTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """STDiT (Open-Sora 1.0). Defaults are those of the published STDiT-XL/2 for 16 frames of 512 x 512 pixels.

    out_channels: twice in_channels, noise and its variance.   caption_length: tokens of a caption, and of
    `caption_projection.y_embedding`, the learned caption that stands for none.
    space_scale, time_scale: positions are patch and frame indices divided by them; 512 pixels had 1.0, 256 had 0.5,
    16 frames 1.0, 64 frames 2/3.
    sample_size, sample_frames: latent size of a pipeline that is told none; the model takes any.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["STDiTBlock"]
    _repeated_blocks = ["STDiTBlock"]
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
        caption_length: int = 120,
        space_scale: float = 1.0,
        time_scale: float = 1.0,
        sample_size: int = 64,
        sample_frames: int = 16,
    ) -> None:
        super().__init__()
        channels = num_attention_heads * attention_head_dim
        check_width(channels)
        patch_size = tuple(patch_size)  # type: ignore[assignment]  # a list, from config.json
        self.pos_embed = VideoPatchEmbed(in_channels, channels, patch_size)
        self.adaln_single = AdaLayerNormSingle(channels)
        self.caption_projection = CaptionProjection(caption_channels, channels, caption_length)
        self.transformer_blocks = nn.ModuleList(
            STDiTBlock(channels, num_attention_heads, mlp_ratio) for _ in range(num_layers)
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
        return_dict: bool = True,
    ) -> Any:
        """hidden_states: [B, in_channels, frames, height, width] of the latents.   timestep: one number or [B], 0 to
        999, as integers or fp32: bf16 would round them.   encoder_hidden_states: [B, L, caption_channels].
        encoder_attention_mask: [B, L], nonzero where a token counts; at least one a row.

        Returns Transformer2DModelOutput(sample), or (sample,): [B, out_channels, frames, height, width], in the dtype
        of `hidden_states`.
        """
        dtype, device, batch = self.pos_embed.proj.weight.dtype, hidden_states.device, len(hidden_states)
        x, grid = self.pos_embed(hidden_states.to(dtype))  # [B, T, S, C]
        frames, height, width = grid
        channels, spacing = x.shape[-1], 1 / self.config.space_scale
        positions = spatial_positions(
            channels, coordinates(height, spacing, device), coordinates(width, spacing, device)
        )
        x = (x + positions.to(dtype)).flatten(1, 2)
        temporal = sincos(channels, coordinates(frames, 1 / self.config.time_scale, device)).to(dtype)

        timestep = per_sample("timestep", timestep, batch, device)
        modulation, embedded = self.adaln_single(timestep, batch_size=batch, hidden_dtype=dtype)
        mask = key_mask(encoder_attention_mask, encoder_hidden_states)
        caption = self.caption_projection(encoder_hidden_states.to(dtype))
        for i, block in enumerate(self.transformer_blocks):
            x = block(
                x,
                encoder_hidden_states=caption,
                encoder_attention_mask=mask,
                timestep=modulation,
                frames=frames,
                temporal_positions=temporal if i == 0 else None,
            )

        shift, scale = (self.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        sample = unpatchify(x, grid, self.pos_embed.patch_size, tuple(hidden_states.shape[2:])).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def check_width(channels: int) -> None:
    """Raises ValueError for a width that positions cannot be made of: sines and cosines of rows and of columns."""
    if channels % 4:
        raise ValueError(
            f"num_attention_heads times attention_head_dim must be a multiple of 4, for sine positions; got {channels}"
        )
