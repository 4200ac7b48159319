# SPDX-License-Identifier: Apache-2.0
"""u W'^T + b'_g = x W^T + b for each transform and any chain of them, in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dq.transforms import Chain, Scale, Shift

K, N, G = 6, 5, 3


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def transforms(seed: int) -> dict[str, Shift | Scale]:
    return {
        "shift": Shift(random((G, K), seed)),
        "one shift": Shift(random((1, K), seed + 1)),
        "scale": Scale(random((K,), seed + 2).exp()),
    }


@given(names=st.lists(st.sampled_from(["shift", "one shift", "scale"]), max_size=4), seed=st.integers(0, 2**20))
@settings(deadline=None)
def test_folding_makes_up_for_the_change_of_the_input(names, seed):
    chain = Chain(tuple(transforms(seed + 10 * i)[name] for i, name in enumerate(names)), (1.0, 2.0))
    x, weight, bias = random((G, 4, K), seed), random((N, K), seed + 1), random((1, N), seed + 2)
    group = torch.arange(G)
    u = chain.forward(x, group)
    new_weight, new_bias = chain.fold(weight, bias)
    expected = x @ weight.T + bias
    actual = u @ new_weight.T + new_bias.expand(G, N)[:, None]
    # fp64 rounding of sums of six products, scaled up by scales of up to e^4 or so
    assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-9)

    multiplier, offset = chain.as_affine(K)
    assert torch.allclose(x * multiplier + offset.expand(G, K)[:, None], u, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_statistics_of_any_rank_are_moved(rank):
    chain = Chain((transforms(0)["shift"], transforms(0)["scale"]))
    x = random((G, *[2] * (rank - 2), K), 0)
    assert chain.forward(x, torch.arange(G)).shape == x.shape
