# SPDX-License-Identifier: Apache-2.0
"""Both models against their equations, written out for one sample, one head and one frame at a time.

The reference below takes the published state dict and shares nothing with the package: no masks (captions are cut to
their tokens), no broadcast over frames, rotations as complex numbers. Everything in fp64.
"""

import cmath
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_dq.opensora import from_original
from diffusers_dq.opensora.embeddings import unpatchify

# fp64 keeps 16 digits; sums of up to 256 products over four blocks of attention lose a few
RELATIVE = 1e-10


def sine(p: float, width: int) -> np.ndarray:
    w = np.array([10000 ** (-i / (width // 2)) for i in range(width // 2)])
    return np.concatenate([np.sin(p * w), np.cos(p * w)])


def space(rows: int, columns: int, width: int, row_step: float, column_step: float) -> Tensor:
    """[S, C]: columns in the first half."""
    table = [
        np.concatenate([sine(c * column_step, width // 2), sine(r * row_step, width // 2)])
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.from_numpy(np.array(table))


def lin(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def embed(p, name, value):
    """A number by 256 fp32 sines and an MLP, [C]."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = torch.tensor(float(value), dtype=torch.float32) * frequencies
    x = torch.cat([angles.cos(), angles.sin()]).double()
    return lin(p, f"{name}.mlp.2", silu(lin(p, f"{name}.mlp.0", x)))


def heads_of(x, heads):
    return x.reshape(len(x), heads, -1).unbind(1)


def attend(q, k, v, heads):
    """[n, C], [m, C], [m, C] -> [n, C]."""
    outputs = []
    for a, b, c in zip(*(heads_of(x, heads) for x in (q, k, v)), strict=True):
        scores = torch.exp((a @ b.T) / math.sqrt(a.shape[-1]))
        outputs.append(scores / scores.sum(-1, keepdim=True) @ c)
    return torch.cat(outputs, dim=-1)


def self_attend(p, name, x, heads, rotary=False):
    q, k, v = lin(p, f"{name}.qkv", x).chunk(3, dim=-1)
    if f"{name}.q_norm.weight" in p:
        q, k = (rms(y, p[f"{name}.{which}_norm.weight"], heads) for y, which in ((q, "q"), (k, "k")))
    if rotary:
        q, k = turn(q, heads), turn(k, heads)
    return lin(p, f"{name}.proj", attend(q, k, v, heads))


def rms(x, weight, heads):
    return torch.cat([y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight for y in heads_of(x, heads)], -1)


def turn(x, heads):
    """Channels 2 i and 2 i + 1 of a head are a complex number, multiplied by exp(1j t 10000^(-2 i / D))."""
    width = x.shape[-1] // heads
    turned = x.clone()
    for t in range(len(x)):
        for h in range(heads):
            for i in range(width // 2):
                at = h * width + 2 * i
                z = complex(x[t, at], x[t, at + 1]) * cmath.exp(1j * t * 10000 ** (-2 * i / width))
                turned[t, at], turned[t, at + 1] = z.real, z.imag
    return turned


def cross(p, name, x, y, heads):
    k, v = lin(p, f"{name}.kv_linear", y).chunk(2, dim=-1)
    return lin(p, f"{name}.proj", attend(lin(p, f"{name}.q_linear", x), k, v, heads))


def patches(p, z):
    """[c, T, H, W] -> [T, S, C]."""
    weight = p["x_embedder.proj.weight"]
    z = F.pad(z, (0, z.shape[-1] % 2, 0, z.shape[-2] % 2))
    c, frames, height, width = z.shape
    z = z.reshape(c, frames, height // 2, 2, width // 2, 2)
    x = torch.einsum("cthawb,ocab->thwo", z, weight[:, :, 0]) + p["x_embedder.proj.bias"]
    return x.reshape(frames, -1, len(weight)), (height // 2, width // 2)


def pictures(x, rows, columns, height, width):
    """[T, S, 4 * 8] -> [8, T, H, W]."""
    frames = len(x)
    x = x.reshape(frames, rows, columns, 2, 2, -1)
    out = torch.empty(x.shape[-1], frames, 2 * rows, 2 * columns, dtype=x.dtype)
    for a in range(2):
        for b in range(2):
            out[:, :, a::2, b::2] = x[:, :, :, a, b].permute(3, 0, 1, 2)
    return out[..., :height, :width]


def caption(p, y, count):
    return lin(p, "y_embedder.y_proj.fc2", gelu(lin(p, "y_embedder.y_proj.fc1", y[:count])))


def stdit(p, z, t, y, count, heads, space_scale=1.0, time_scale=1.0):
    """One sample: z [c, T, H, W], y [L, channels] of which `count` tokens are read."""
    x, (rows, columns) = patches(p, z)
    frames, spots, width = x.shape
    x = x + space(rows, columns, width, 1 / space_scale, 1 / space_scale)
    emb = embed(p, "t_embedder", t)
    t0 = lin(p, "t_block.1", silu(emb)).reshape(6, width)
    y = caption(p, y, count)
    for i in range(2):
        b = f"blocks.{i}"
        sh1, sc1, g1, sh2, sc2, g2 = p[f"{b}.scale_shift_table"] + t0
        x = x + g1 * torch.stack([self_attend(p, f"{b}.attn", norm(f) * (1 + sc1) + sh1, heads) for f in x])
        tpe = torch.from_numpy(np.array([sine(f / time_scale, width) for f in range(frames)])) if i == 0 else 0
        x = x + g1 * torch.stack([self_attend(p, f"{b}.attn_temp", x[:, s] + tpe, heads) for s in range(spots)], 1)
        x = x + torch.stack([cross(p, f"{b}.cross_attn", f, y, heads) for f in x])
        x = x + g2 * lin(p, f"{b}.mlp.fc2", gelu(lin(p, f"{b}.mlp.fc1", norm(x) * (1 + sc2) + sh2)))
    shift, scale = p["final_layer.scale_shift_table"] + emb
    x = lin(p, "final_layer.linear", norm(x) * (1 + scale) + shift)
    return pictures(x, rows, columns, *z.shape[2:])


def stdit3(p, z, t, y, count, heads, fps, height, width, denoised, sample_size=512):
    """One sample; denoised: a bool a frame."""
    x, (rows, columns) = patches(p, z)
    frames, spots, channels = x.shape
    scale, side = math.sqrt(height * width) / sample_size, round(math.sqrt(rows * columns))
    x = x + space(rows, columns, channels, side / rows / scale, side / columns / scale)
    embs = [embed(p, "t_embedder", t if d else 0) + embed(p, "fps_embedder", fps) for d in denoised]
    t0s = [lin(p, "t_block.1", silu(emb)).reshape(6, channels) for emb in embs]
    y = caption(p, y, count)
    for i in range(2):
        for stack in ("spatial", "temporal"):
            b = f"{stack}_blocks.{i}"
            m = torch.stack([p[f"{b}.scale_shift_table"] + t0 for t0 in t0s])[:, :, None]  # [T, 6, 1, C]
            a = norm(x) * (1 + m[:, 1]) + m[:, 0]
            if stack == "spatial":
                a = torch.stack([self_attend(p, f"{b}.attn", f, heads) for f in a])
            else:
                a = torch.stack([self_attend(p, f"{b}.attn", a[:, s], heads, rotary=True) for s in range(spots)], 1)
            x = x + m[:, 2] * a
            x = x + torch.stack([cross(p, f"{b}.cross_attn", f, y, heads) for f in x])
            mlp = lin(p, f"{b}.mlp.fc2", gelu(lin(p, f"{b}.mlp.fc1", norm(x) * (1 + m[:, 4]) + m[:, 3])))
            x = x + m[:, 5] * mlp
    shift, scale = (torch.stack([row + emb for emb in embs])[:, None] for row in p["final_layer.scale_shift_table"])
    x = lin(p, "final_layer.linear", norm(x) * (1 + scale) + shift)
    return pictures(x, rows, columns, *z.shape[2:])


def assert_equal_to_rounding(output, expected):
    assert (output - expected).abs().max() <= RELATIVE * expected.abs().max()


LENGTHS = (6, 3)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, {"space_scale": 0.5, "time_scale": 2 / 3}], ids=["512", "256"])
def test_stdit_is_its_equations(published_v1, draw, config):
    model = from_original(published_v1, dtype=torch.float64, num_attention_heads=2, **config)
    z, y, times = draw(2, 4, 3, 6, 8), draw(2, 6, 24), (999, 421)
    output = model(z, torch.tensor(times), y, MASK).sample
    assert output.shape == (2, 8, 3, 6, 8)
    for b in range(2):
        assert_equal_to_rounding(output[b], stdit(published_v1, z[b], times[b], y[b], LENGTHS[b], 2, **config))


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["all frames", "given frames"])
def test_stdit3_is_its_equations(published_v3, draw, masked):
    """Odd latents are filled up and cut again; the second sample has other frames given and another frame rate."""
    model = from_original(published_v3, dtype=torch.float64)
    z, y, times, fps = draw(2, 4, 4, 5, 7), draw(2, 6, 24), (987.3, 12.25), (24.0, 120.0)
    denoised = torch.tensor([[False, True, True, True], [True, False, False, True]] if masked else [[True] * 4] * 2)
    output = model(
        z,
        torch.tensor(times),
        y,
        MASK,
        fps=torch.tensor(fps),
        height=40,
        width=56,
        frame_mask=denoised if masked else None,
    ).sample
    assert output.shape == (2, 8, 4, 5, 7)
    for b in range(2):
        expected = stdit3(published_v3, z[b], times[b], y[b], LENGTHS[b], 2, fps[b], 40, 56, denoised[b])
        assert_equal_to_rounding(output[b], expected)


@torch.no_grad()
def test_stdit3_without_norms_of_query_and_key(published_v3, draw):
    plain = {name: tensor for name, tensor in published_v3.items() if "_norm." not in name}
    model = from_original(plain, dtype=torch.float64, num_attention_heads=2)
    z, y = draw(1, 4, 2, 4, 4), draw(1, 6, 24)
    output = model(z, 500.0, y, fps=8).sample
    assert_equal_to_rounding(output[0], stdit3(plain, z[0], 500.0, y[0], 6, 2, 8, 32, 32, [True] * 2))


@torch.no_grad()
def test_captions_without_a_mask_count_whole(published_v1, draw):
    model = from_original(published_v1, dtype=torch.float64, num_attention_heads=2)
    z, y = draw(2, 4, 2, 4, 4), draw(2, 6, 24)
    everything = model(z, 7, y).sample
    assert torch.equal(everything, model(z, 7, y, torch.ones(2, 6)).sample)
    assert not torch.allclose(everything, model(z, 7, y, MASK).sample)


@torch.no_grad()
def test_tokens_that_do_not_count_are_not_read(published_v3, draw):
    model = from_original(published_v3, dtype=torch.float64)
    z, y = draw(2, 4, 2, 4, 4), draw(2, 6, 24)
    other = torch.where(MASK[..., None].bool(), y, 1e3)
    assert torch.equal(model(z, 7.0, y, MASK).sample, model(z, 7.0, other, MASK).sample)


@torch.no_grad()
@pytest.mark.parametrize(("which", "timestep"), [("published_v1", 999), ("published_v3", 987.3)])
def test_a_model_in_bf16_does_not_round_its_timestep(which, timestep, request, draw):
    """bf16 holds 8 bits: 999 would become 1000, and 987.3 become 988."""
    model = from_original(request.getfixturevalue(which), dtype=torch.bfloat16, num_attention_heads=2)
    seen = []
    model.adaln_single.emb.time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = model(draw(1, 4, 2, 4, 4).float(), torch.tensor([timestep]), draw(1, 6, 24).float()).sample
    assert seen[0].item() == torch.tensor(timestep).item()
    assert output.dtype == torch.float32 and output.isfinite().all()


def test_unpatchify_undoes_patches():
    video = torch.arange(2 * 3 * 4 * 6 * 8.0).reshape(2, 3, 4, 6, 8)
    tokens = video.reshape(2, 3, 2, 2, 3, 2, 4, 2).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(2, 24, 24)
    assert torch.equal(unpatchify(tokens, (2, 3, 4), (2, 2, 2), (4, 6, 8)), video)


@torch.no_grad()
def test_shapes_that_do_not_fit_are_refused(published_v1, published_v3, draw):
    one = from_original(published_v1, num_attention_heads=2)
    three = from_original(published_v3)
    z, y = draw(2, 4, 2, 4, 4).float(), draw(2, 6, 24).float()
    with pytest.raises(ValueError, match=r"timestep must be one number or have shape \[2\], got \[3\]"):
        one(z, torch.zeros(3), y)
    with pytest.raises(ValueError, match=r"encoder_attention_mask must have shape \[2, 6\].*got \[1, 6\]"):
        one(z, 5, y, MASK[:1])
    with pytest.raises(ValueError, match=r"frame_mask must have shape \[2, 2\], got \[2, 4\]"):
        three(z, 5, y, frame_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="multiple of 4"):
        type(one)(num_attention_heads=2, attention_head_dim=3)
