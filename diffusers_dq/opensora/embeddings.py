# SPDX-License-Identifier: Apache-2.0
"""What both STDiTs put in front of their blocks: patches, sine positions, captions and times.

Notation: B batch, T frames and H x W patches of a frame, S = H W, C width, L caption tokens.
"""

import torch
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

Grid = tuple[int, int, int]


def sincos(channels: int, positions: Tensor) -> Tensor:
    """cat(sin(p w), cos(p w)) with w_i = 10000^(-i / (D / 2)), in the dtype of `positions`.

    channels: D, even.   positions: [n], floating.   Returns [n, D].
    """
    half = channels // 2
    exponents = torch.arange(half, dtype=positions.dtype, device=positions.device) / half
    angles = positions[:, None] * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def spatial_positions(channels: int, rows: Tensor, columns: Tensor) -> Tensor:
    """The first C / 2 channels are of the column, the others of the row. rows: [H]. columns: [W]. Returns [H W, C]."""
    height, width = len(rows), len(columns)
    column, row = sincos(channels // 2, columns), sincos(channels // 2, rows)
    return torch.cat([column.repeat(height, 1), row.repeat_interleave(width, dim=0)], dim=-1)


def coordinates(count: int, spacing: float, device: torch.device) -> Tensor:
    """[0, 1, ..., count - 1] times spacing: [count] float64, float32 where the device has no float64 (mps)."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.arange(count, dtype=dtype, device=device) * spacing


class VideoPatchEmbed(nn.Module):
    """A Conv3d whose stride is its kernel, without a norm; a last patch that is not whole is filled with zeros."""

    def __init__(self, in_channels: int, channels: int, patch_size: Grid) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, channels, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> tuple[Tensor, Grid]:
        """latents: [B, channels, frames, height, width].   Returns tokens [B, T, S, C] and (T, H, W)."""
        padding = [-size % patch for size, patch in zip(latents.shape[2:], self.patch_size, strict=True)]
        if any(padding):
            latents = F.pad(latents, [0, padding[2], 0, padding[1], 0, padding[0]])
        patches = self.proj(latents)  # [B, C, T, H, W]
        frames, height, width = patches.shape[2:]
        return patches.flatten(3).permute(0, 2, 3, 1), (frames, height, width)


def unpatchify(tokens: Tensor, grid: Grid, patch_size: Grid, size: tuple[int, ...]) -> Tensor:
    """The inverse of `VideoPatchEmbed`, cut to the latents' own size.

    tokens: [B, T S, (patch frames, patch height, patch width, channels)].   size: (frames, height, width), the
    latents'.   Returns [B, channels, frames, height, width].
    """
    batch = len(tokens)
    x = tokens.reshape(batch, *grid, *patch_size, -1)  # [B, T, H, W, t, h, w, channels]
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
    whole = [count * patch for count, patch in zip(grid, patch_size, strict=True)]
    frames, height, width = size
    return x.reshape(batch, -1, *whole)[:, :, :frames, :height, :width]


class CaptionProjection(PixArtAlphaTextProjection):
    """Linear, tanh-GELU, linear; and `y_embedding` [L, caption channels], the learned caption that stands for none.

    It is a buffer: classifier-free guidance needs it, training leaves it alone.
    """

    y_embedding: Tensor

    def __init__(self, in_features: int, channels: int, length: int) -> None:
        super().__init__(in_features, channels)
        self.register_buffer("y_embedding", torch.randn(length, in_features) / in_features**0.5)


class TimestepFpsEmbedding(nn.Module):
    """Timestep and frame rate, each by sines of 256 channels and an MLP; their sum [B, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, channels)
        self.fps_embedder = TimestepEmbedding(256, channels)

    def forward(self, timestep: Tensor, fps: Tensor, hidden_dtype: torch.dtype) -> Tensor:
        """timestep, fps: [B], of any dtype: cast to fp32 for the sines and to `hidden_dtype` after them."""
        time: Tensor = self.timestep_embedder(self.time_proj(timestep).to(hidden_dtype))
        return time + self.fps_embedder(self.time_proj(fps).to(hidden_dtype))


class AdaLayerNormSingleFps(nn.Module):
    """diffusers' AdaLayerNormSingle with the frame rate as a second condition."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.emb = TimestepFpsEmbedding(channels)
        self.silu = nn.SiLU()
        self.linear = nn.Linear(channels, 6 * channels)

    def forward(self, timestep: Tensor, fps: Tensor, hidden_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns what blocks add to their tables, [B, 6 C], and what the last layer adds to its own, [B, C]."""
        embedded = self.emb(timestep, fps, hidden_dtype)
        return self.linear(self.silu(embedded)), embedded


def per_sample(name: str, value: Tensor | float, batch: int, device: torch.device) -> Tensor:
    """A number, or one a sample, as [B]; a tensor's dtype stays, a Python number is fp32 (bf16 would not hold 999).

    Raises ValueError for any other shape.
    """
    if not isinstance(value, Tensor):
        return torch.full((batch,), value, dtype=torch.float32, device=device)
    if value.numel() != 1 and value.shape != (batch,):
        raise ValueError(f"{name} must be one number or have shape [{batch}], got {list(value.shape)}")
    return value.to(device).reshape(-1).expand(batch)


def key_mask(mask: Tensor | None, captions: Tensor) -> Tensor | None:
    """Caption tokens that may be attended to, as diffusers' Attention takes them: bool [B, 1, L].

    mask: [B, L], nonzero where a token counts.   captions: [B, L, ...].   Raises ValueError for another shape.
    """
    if mask is None:
        return None
    if mask.shape != captions.shape[:2]:
        raise ValueError(
            f"encoder_attention_mask must have shape {list(captions.shape[:2])} [batch, caption tokens], as"
            f" encoder_hidden_states; got {list(mask.shape)}"
        )
    return mask.bool()[:, None]
