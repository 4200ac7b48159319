# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusers_dq.evaluation.distribution import fid, inception_score, kid, precision_recall

RNG = np.random.default_rng(0)
TOLERANCE = 1e-10  # fp64 sums of some hundred terms of size 1, and a few eigenvalue decompositions


def gaussian(n: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, width))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 40), width=st.integers(1, 30), scale=st.floats(0.1, 10))
def test_fid_of_equal_sets_is_zero_also_without_full_rank(n, width, scale):
    x = scale * gaussian(n, width)
    # what is left is fp64 rounding of a trace of size scale^2 width
    assert 0 <= fid(x, x[::-1].copy()) <= 1e-12 * scale**2 * width


def test_fid_is_that_of_two_gaussians_given_by_mean_and_covariance():
    """Samples whose mean and covariance are exactly those wanted; with diagonal covariances
    FID = |m1 - m2|^2 + sum (s1 - s2)^2."""
    n, width = 200, 6
    white = gaussian(n, width)
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    np.testing.assert_allclose(np.cov(white.T), np.eye(width), atol=TOLERANCE)
    m1, m2, s1, s2 = RNG.random((4, width)) + 0.5
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert fid(m1 + s1 * white, m2 + s2 * white) == pytest.approx(expected, rel=TOLERANCE)
    assert fid(m1 + white, m2 + white) == pytest.approx(((m1 - m2) ** 2).sum(), rel=TOLERANCE)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(2, 12))
def test_fid_neither_minds_the_order_of_sets_nor_a_rotation(seed, width):
    x, y = gaussian(50, width, seed), 2 * gaussian(40, width, seed + 1) + 1
    rotation = np.linalg.qr(gaussian(width, width, seed + 2))[0]
    value = fid(x, y)
    assert fid(y, x) == pytest.approx(value, rel=TOLERANCE)
    assert fid(x @ rotation, y @ rotation) == pytest.approx(value, rel=TOLERANCE)


class Given(nn.Module):
    """For torchmetrics: features are what it is given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_fid_is_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    x, y = torch.from_numpy(gaussian(300, 8)), torch.from_numpy(1.5 * gaussian(200, 8, 1) + 0.3)
    metric = FrechetInceptionDistance(feature=Given(8)).set_dtype(torch.float64)
    metric.update(y, real=True)
    metric.update(x, real=False)
    # it takes covariances as differences of large sums, and eigenvalues of a matrix that is not symmetric
    assert fid(x, y) == pytest.approx(float(metric.compute()), rel=1e-8)


def test_kid_is_torchmetrics_over_one_subset_of_all_pictures():
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = torch.from_numpy(gaussian(60, 8)), torch.from_numpy(gaussian(60, 8, 1) + 0.3)
    metric = KernelInceptionDistance(feature=Given(8), subsets=1, subset_size=60)
    metric.update(y, real=True)
    metric.update(x, real=False)
    assert kid(x, y) == pytest.approx(float(metric.compute()[0]), rel=1e-5)  # fp32 there


def test_kid_is_the_mean_over_all_pairs_of_different_pictures():
    x, y = gaussian(7, 3), gaussian(5, 3, 1)

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    within_x = np.mean([k(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
    within_y = np.mean([k(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    across = np.mean([k(a, b) for a in x for b in y])
    assert kid(x, y) == pytest.approx(within_x + within_y - 2 * across, rel=TOLERANCE)


def test_inception_score_of_certain_pictures_is_the_number_of_classes():
    classes = 5
    logits = 1e4 * np.eye(classes)
    assert inception_score(np.repeat(logits, 3, axis=0)) == pytest.approx(classes, rel=TOLERANCE)
    assert inception_score(np.zeros((4, classes))) == pytest.approx(1, rel=TOLERANCE)
    assert inception_score(np.repeat(logits[:1], 4, axis=0)) == pytest.approx(1, rel=TOLERANCE)


def test_inception_score_is_torchmetrics_over_one_split():
    from torchmetrics.image.inception import InceptionScore

    logits = torch.from_numpy(gaussian(50, 10))
    metric = InceptionScore(feature=Given(10), splits=1)
    metric.update(logits)
    assert inception_score(logits) == pytest.approx(float(metric.compute()[0]), rel=1e-6)  # fp32 there


def covered_by_hand(points, centres, k):
    inside = 0
    for point in points:
        for i, centre in enumerate(centres):
            others = sorted(math.dist(centre, other) for j, other in enumerate(centres) if j != i)
            if math.dist(point, centre) <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(4, 20), m=st.integers(4, 20), k=st.integers(1, 3))
def test_precision_and_recall_are_those_of_the_definition(seed, n, m, k):
    x, y = gaussian(n, 3, seed), gaussian(m, 3, seed + 1) + 0.5
    assert precision_recall(x, y, k) == (covered_by_hand(x, y, k), covered_by_hand(y, x, k))


def test_precision_and_recall_where_points_lie_on_the_surface_of_balls():
    """Integers: many distances are equal. More points than a block of the distance matrix has rows."""
    x = RNG.permutation(np.stack(np.meshgrid(*[np.arange(7.0)] * 2), -1).reshape(-1, 2))
    y = x[::2] + np.array([1.0, 0])
    assert precision_recall(x, y, 3) == (covered_by_hand(x, y, 3), covered_by_hand(y, x, 3))
    many = gaussian(1500, 2)
    assert precision_recall(many, many) == (1, 1)
    assert precision_recall(many, many + 1000) == (0, 0)


@pytest.mark.parametrize("metric", [fid, kid, precision_recall])
def test_features_that_do_not_fit_are_refused(metric):
    x = gaussian(10, 4)
    with pytest.raises(ValueError, match="differ in width: 4 and 3"):
        metric(x, x[:, :3])
    with pytest.raises(ValueError, match=r"2 pictures at least, got torch.float64 \(1, 4\)"):
        metric(x, x[:1])
    with pytest.raises(ValueError, match="generated features of 1 of 10 pictures are not finite"):
        metric(np.where(np.arange(10)[:, None] == 3, np.nan, x), x)
    with pytest.raises(ValueError, match="got torch.int64"):
        metric(x.astype(np.int64), x)


def test_as_many_pictures_as_neighbours_are_refused():
    with pytest.raises(ValueError, match="k = 3 need 4 pictures at least, got 10 and 3"):
        precision_recall(gaussian(10, 2), gaussian(3, 2))
