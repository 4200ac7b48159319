# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dq.balancing import balance, spearman


def test_with_half_each_input_and_weight_end_up_equally_large():
    x, w = torch.rand(16, dtype=torch.float64) + 0.1, torch.rand(16, dtype=torch.float64) + 0.1
    s = balance(x, w)
    assert torch.allclose(x / s, (x * w).sqrt()) and torch.allclose(w * s, (x * w).sqrt())


@pytest.mark.parametrize(("alpha", "left"), [(1.0, "input"), (0.0, "weight")])
def test_at_its_ends_alpha_levels_one_side(alpha, left):
    x, w = torch.rand(16, dtype=torch.float64) + 0.1, torch.rand(16, dtype=torch.float64) + 0.1
    s = balance(x, w, alpha)
    assert torch.allclose(x / s if left == "input" else w * s, torch.ones(16, dtype=torch.float64))


def test_dead_channels_keep_their_scale():
    s = balance(torch.tensor([0.0, 4.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert s.tolist() == [1.0, 1.0, 2.0]


VALUES = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=12)  # few values, so that many are tied


def pearson(a, b):
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    product = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    norms = sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
    return product / norms**0.5 if norms else 0.0


def ranks(values):
    """Average ranks, counted one by one."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


@given(VALUES, st.randoms(use_true_random=False))
def test_spearman_is_pearson_of_average_ranks(row, random):
    reference = [float(random.randint(-3, 3)) for _ in row]
    rho = spearman(torch.tensor([row, row[::-1]]), torch.tensor(reference))
    assert rho.tolist() == pytest.approx([pearson(ranks(r), ranks(reference)) for r in (row, row[::-1])], abs=1e-12)


def test_spearman_knows_only_the_order():
    x = torch.tensor([0.1, 5.0, 2.0, 9.0])
    assert spearman(torch.stack([x, x.exp(), -x]), x).tolist() == pytest.approx([1, 1, -1])
