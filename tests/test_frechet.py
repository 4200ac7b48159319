# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import scipy.linalg
import torch

from diffusers_dq.frechet import frechet_distance


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_distance(torch.from_numpy(x), torch.from_numpy(y))


def test_frechet_distance_of_two_gaussians():
    random = np.random.default_rng(0)
    x = random.normal(size=(20000, 3))
    moved, stretched = x + [3.0, 0, 0], x * [1.0, 2.0, 1.0]
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, moved) == pytest.approx(9, rel=1e-6)
    assert frechet(x, stretched) == pytest.approx(1, rel=0.05)  # (2 - 1)^2 of one deviation
    with pytest.raises(ValueError, match="at least two pictures"):
        frechet(x[:1], x)


def test_frechet_distance_is_the_one_of_matrix_roots():
    random = np.random.default_rng(1)
    x, y = random.normal(size=(40, 6)), random.normal(size=(50, 6)) @ random.normal(size=(6, 6))
    a, b = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(a @ b).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * root)
    assert frechet(x, y) == pytest.approx(expected)
