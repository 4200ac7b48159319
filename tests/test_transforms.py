# SPDX-License-Identifier: Apache-2.0
"""u W'^T + b'_g = x W^T + b for each transform and any chain of them, in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dq.transforms import Chain, Rotate, Scale, Shift

K, N, G = 8, 5, 3


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def transforms(seed: int) -> dict[str, Shift | Scale]:
    return {
        "shift": Shift(random((G, K), seed)),
        "one shift": Shift(random((1, K), seed + 1)),
        "scale": Scale(random((K,), seed + 2).exp()),
    }


@given(
    names=st.lists(st.sampled_from(["shift", "one shift", "scale"]), max_size=4),
    rotated=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None)
def test_folding_makes_up_for_the_change_of_the_input(names, rotated, seed):
    of_channels = tuple(transforms(seed + 10 * i)[name] for i, name in enumerate(names))
    chain = Chain(of_channels, (1.0, 2.0), Rotate.random(K, seed) if rotated else None)
    x, weight, bias = random((G, 4, K), seed), random((N, K), seed + 1), random((1, N), seed + 2)
    group = torch.arange(G)
    u = chain.forward(x, group)
    new_weight, new_bias = chain.fold(weight, bias)
    expected = x @ weight.T + bias
    actual = u @ new_weight.T + new_bias.expand(G, N)[:, None]
    # fp64 rounding of sums of eight products, scaled up by scales of up to e^4 or so
    assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-9)

    multiplier, offset = chain.as_affine(K)
    upstream = x * multiplier + offset.expand(G, K)[:, None]
    if chain.rotation is not None:
        upstream = chain.rotation.forward(upstream, group)
    assert torch.allclose(upstream, u, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_statistics_of_any_rank_are_moved(rank):
    chain = Chain((transforms(0)["shift"], transforms(0)["scale"]))
    x = random((G, *[2] * (rank - 2), K), 0)
    assert chain.forward(x, torch.arange(G)).shape == x.shape


@pytest.mark.parametrize(("channels", "order"), [(1152, 64), (4608, 256), (72, 4), (12, 4)])
def test_a_rotation_keeps_lengths_and_spreads_one_channel_over_its_block(channels, order):
    rotation = Rotate.random(channels, seed=0)
    assert rotation is not None and rotation.order == order
    x = torch.zeros(1, channels, dtype=torch.float64)
    x[0, 5] = 1
    u = rotation.forward(x, torch.zeros(1, dtype=torch.int64))
    assert u.norm().item() == pytest.approx(1)
    assert u.abs().max().item() == pytest.approx(order**-0.5)


def test_a_rotation_is_the_same_for_the_same_seed_and_absent_where_no_order_fits():
    first, again, other = (Rotate.random(64, seed) for seed in (1, 1, 2))
    assert torch.equal(first.signs, again.signs) and not torch.equal(first.signs, other.signs)
    assert Rotate.random(6, seed=0) is None
    assert Rotate.random(72, seed=0, full_width=True).order == 72
    assert Rotate.random(40, seed=0, full_width=True).order == 4, "there is no matrix of 40"
