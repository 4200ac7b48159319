# SPDX-License-Identifier: Apache-2.0
"""The branch that is not rounded: the best of its rank, and where transforms leave it."""

import copy

import pytest
import torch
from diffusers import DiTPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CALLS, tiny_pipeline

import diffusers_dq as dq
from diffusers_dq.building import build_linear
from diffusers_dq.inputs import InputRange
from diffusers_dq.low_rank import low_rank_factors
from diffusers_dq.planning import LinearPlan
from diffusers_dq.recipe import Recipe
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.timesteps import TimestepGroups
from diffusers_dq.transforms import Chain, Rotate, Scale, Shift

K, N, RANK, BOUNDARY = 32, 24, 2, 500.0


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 14), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_what_is_left_are_the_smaller_singular_values(rows, columns, rank, seed):
    """Eckart and Young: |W - U D|^2 is the sum of the squares of the others, up to fp64 sums of squares."""
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    down, up = low_rank_factors(weight, rank)
    kept = min(rank, rows, columns)
    assert down.shape == (kept, columns) and up.shape == (rows, kept)
    least = torch.linalg.svdvals(weight)[rank:].square().sum()
    assert ((weight - up @ down).square().sum() - least).abs() <= 1e-12 * weight.square().sum()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_it_is_the_truncated_decomposition_where_values_are_apart(shape):
    """Singular values 1, 1/2, 1/4, ...: eigenvectors lose a factor of 4^3 of fp64's 16 digits."""
    generator = torch.Generator().manual_seed(1)
    n = min(shape)
    u, v = (torch.linalg.qr(torch.randn(m, n, dtype=torch.float64, generator=generator))[0] for m in shape)
    values = 0.5 ** torch.arange(n, dtype=torch.float64)
    down, up = low_rank_factors(u * values @ v.T, 3)
    assert torch.allclose(up @ down, u[:, :3] * values[:3] @ v[:, :3].T, rtol=0, atol=1e-12)
    assert low_rank_factors((u * values @ v.T).float(), 3)[0].dtype == torch.float32


CHAINS = {
    "nothing": (),
    "scale": ("scale",),
    "shift": ("shift",),
    "shift by group, scale": ("shifts", "scale"),
    "rotation": ("rotation",),
    "all": ("shifts", "scale", "rotation"),
}


def chain_of(parts) -> Chain:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(2, K, generator=generator)
    scale = Scale(torch.rand(K, generator=generator) + 0.5)
    known = {"shifts": Shift(z), "shift": Shift(z[:1]), "scale": scale}
    rotation = Rotate.random(K, seed=3) if "rotation" in parts else None
    boundaries = (BOUNDARY,) if "shifts" in parts else ()
    return Chain(tuple(known[part] for part in parts if part in known), boundaries, rotation)


INPUTS = {
    None: None,
    "static": QuantScheme(bits=8, granularity="tensor", symmetric=False),
    "token": QuantScheme(bits=8, granularity="token", dynamic=True),
}


@pytest.mark.parametrize("rounding", INPUTS)
@pytest.mark.parametrize("online", [True, False], ids=["online", "upstream"])
@pytest.mark.parametrize("parts", CHAINS.values(), ids=CHAINS)
@torch.no_grad()
def test_a_weight_of_that_rank_passes_any_chain_and_any_rounding_unchanged(parts, online, rounding):
    """All of it is in the branch, and what is rounded is zero. What remains are biases and shifts in fp32."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(K, N).double()
    factors = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((N, RANK), (RANK, K))]
    linear.weight.copy_(factors[0] @ factors[1])
    x = torch.randn(50, K, dtype=torch.float64, generator=generator) + 1
    chain = chain_of(parts)
    found = InputRange(torch.tensor([0.05]), torch.tensor([7], dtype=torch.int32)) if rounding == "static" else None
    plan = LinearPlan(
        QuantScheme(bits=4, granularity="channel"),
        INPUTS[rounding],
        chain,
        online=online,
        input_range=found,
        recipe=Recipe(low_rank=RANK),
    )
    groups = TimestepGroups()
    layer = build_linear(linear, plan, 0, groups, torch.float64)
    assert layer.layout.low_rank == RANK and layer.low_rank_up.shape == (N, RANK)
    for group in range(len(chain.boundaries) + 1):
        groups.index.fill_(group)
        upstream = Chain(chain.transforms, chain.boundaries).forward(x[None], torch.tensor([group]))[0]
        output, expected = layer(x if online else upstream), linear(x)
        assert (output - expected).norm() <= 1e-6 * expected.norm()


@torch.no_grad()
def test_a_rank_whose_factors_are_no_smaller_than_the_weight_is_no_branch():
    linear = torch.nn.Linear(32, 32)
    for rank, there in ((15, True), (16, False)):
        plan = LinearPlan(QuantScheme(bits=4, granularity="channel"), recipe=Recipe(low_rank=rank))
        layer = build_linear(linear, plan, 0, TimestepGroups(), torch.float32)
        assert (layer.low_rank_up is not None) == there == (layer.layout.low_rank == rank)


def quantized(folder, statistics, **config):
    pipe = DiTPipeline.from_pretrained(folder)
    settings = dict(method="rtn", weight_bits=4, activation_bits=16)
    dq.quantize(pipe, dq.DQConfig(**{**settings, **config}), statistics=statistics, progress=False)
    return pipe


@torch.no_grad()
def with_a_strong_direction():
    """Each weight of the blocks gains one direction ten times as large as the rest."""
    pipe = tiny_pipeline()
    generator = torch.Generator().manual_seed(5)
    for block in pipe.transformer.transformer_blocks:
        for name, linear in block.named_modules():
            if isinstance(linear, torch.nn.Linear) and "emb" not in name:
                n, k = linear.weight.shape
                direction = torch.randn(n, 1, generator=generator) * torch.randn(k, generator=generator)
                linear.weight += linear.weight.norm() * 10 * direction / direction.norm()
    return pipe


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "adaround"])
@torch.no_grad()
def test_with_every_rounding_little_of_a_strong_direction_is_lost(rounding, run_dit):
    """Ranges of what is left are a small part of those of the whole. Seen: 0.25 to 0.48 of the error."""
    pipe = with_a_strong_direction()
    full = run_dit(pipe.transformer)
    statistics = dq.calibrate(pipe, CALLS, num_inference_steps=4, samples=4, second_moments=True, progress=False)
    errors = []
    for rank in (0, 2):
        pipe = with_a_strong_direction()
        settings = dict(rounding=rounding, reconstruction=dict(iterations=5), low_rank=rank)
        config = dq.DQConfig("rtn", weight_bits=4, activation_bits=16, **settings)
        dq.quantize(pipe, config, statistics=statistics, progress=False)
        errors.append((run_dit(pipe.transformer) - full).norm())
    print(f"\n{rounding}: {errors[1] / errors[0]:.3f} of the error without")
    assert errors[1] < 0.7 * errors[0]


def test_the_report_counts_the_factors(dit_folder, dit_statistics):
    """4 bytes a value of r (N + K)."""
    plain, with_branch = (dq.inspect(quantized(dit_folder, dit_statistics, low_rank=rank)) for rank in (0, 4))
    widths = {"to_q": (32, 32), "ff.net.0.proj": (128, 32), "ff.net.2": (32, 128), "norm1.linear": (192, 32)}
    for before, after in zip(plain.quantized, with_branch.quantized, strict=True):
        for name, width in widths.items():
            if after.name.endswith(name):
                assert after.nbytes - before.nbytes == 4 * 4 * sum(width)


@pytest.mark.parametrize("config", [dict(), dict(method="quarot"), dict(method="svdquant", group_size=32)], ids=str)
@torch.no_grad()
def test_dequantized_it_is_part_of_the_weight(config, dit_folder, dit_statistics, run_dit):
    """The same function, up to fp32 sums in another order."""
    model = quantized(dit_folder, dit_statistics, low_rank=4, **config).transformer
    expected = run_dit(model)
    assert copy.deepcopy(model).transformer_blocks[0].attn1.to_q.layout.low_rank == 4
    model.dequantize()
    assert type(model.transformer_blocks[0].attn1.to_q) is torch.nn.Linear
    assert (run_dit(model) - expected).norm() <= 1e-5 * expected.norm()
