# SPDX-License-Identifier: Apache-2.0
"""The distance of two sets of features as of two Gaussians: of Inception's, FID."""

import torch
from torch import Tensor


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians (Heusel et al., 2017, Eq. 6).

    x: [n, D], y: [m, D], both fp64.   The covariances C divide by n - 1 and m - 1, as the usual programs do.
    With C1 = L^T L and C2 = R^T R the eigenvalues of C1 C2 are the squared singular values of L R^T, of any rank: no
    root of a matrix, nothing that turns complex. Raises ValueError for less than two rows.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a Frechet distance needs at least two pictures on both sides, got {len(x)} and {len(y)}")
    mean = (x.mean(0) - y.mean(0)).square().sum()
    left, right = _root(x), _root(y)
    cross = torch.linalg.svdvals(left @ right.T).sum()
    return max(0.0, float(mean + left.square().sum() + right.square().sum() - 2 * cross))


def _root(features: Tensor) -> Tensor:
    """R, [min(n, D), D], with R^T R the covariance."""
    return torch.linalg.qr((features - features.mean(0)) / (len(features) - 1) ** 0.5, mode="r").R
