# SPDX-License-Identifier: Apache-2.0
"""How far one set of pictures is from another, and how varied it is: figures of features, not of pixels.

Features: [n, D], numpy or torch, any floating dtype; everything here is computed in fp64 on the CPU and draws nothing
at random, so that a figure is a function of the two sets. FID of the spatial features is sFID (Nash et al., 2021).
"""

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from diffusers_dq.evaluation.metrics import Array
from diffusers_dq.frechet import frechet_distance

Features: TypeAlias = Array | Tensor

_BLOCK = 1024  # rows of a distance matrix that are in memory at a time
_SURFACE = 1 + 1e-7


def fid(generated: Features, reference: Features) -> float:
    """Frechet distance of two sets (frechet.py).

    generated: [n, D].   reference: [m, D].   Below some thousands of pictures the figure is biased upwards, the more
    the larger D is: compare equal n only. Memory: some copies of the sets in fp64. Raises ValueError for less than 2
    rows or for features of other widths.
    """
    return frechet_distance(*_two(generated, reference))


def kid(generated: Features, reference: Features) -> float:
    """Squared MMD with the kernel (x.y / D + 1)^3, without bias (Binkowski et al., 2018, Section 4 and Eq. 4).

    Over all pairs, where the paper averages over subsets drawn at random. May be slightly negative for sets of one
    distribution. Raises ValueError as `fid`.
    """
    x, y = _two(generated, reference)
    within = [(_kernel_sum(z, z) - _kernel(z, z, diagonal=True)) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return within[0] + within[1] - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def inception_score(logits: Features) -> float:
    """exp(mean over pictures of KL(p(c | x) || p(c))) (Salimans et al., 2016), over the whole set, not in splits.

    logits: [n, C] before the softmax. Between 1 and C. Raises ValueError for less than 2 rows.
    """
    log_p = _features(logits, "logits").log_softmax(1)
    log_marginal = log_p.logsumexp(0) - torch.tensor(float(len(log_p)), dtype=torch.float64).log()
    return float((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())


def precision_recall(generated: Features, reference: Features, k: int = 3) -> tuple[float, float]:
    """Shares of generated pictures on the reference's manifold, and the reverse (Kynkaanniemi et al., 2019, Eq. 1).

    A set's manifold is the union of balls around its features that reach to the k-th nearest other feature of the set.
    Takes n x m distances. Raises ValueError as `fid`, and for sets of k pictures or less.
    """
    x, y = _two(generated, reference)
    if min(len(x), len(y)) <= k:
        raise ValueError(
            f"precision and recall with k = {k} need {k + 1} pictures at least, got {len(x)} and {len(y)}"
        )
    return _covered(x, y, _radii(y, k)), _covered(y, x, _radii(x, k))


def _features(features: Features, what: str) -> Tensor:
    tensor = torch.as_tensor(features).detach().cpu()
    if tensor.ndim != 2 or len(tensor) < 2 or not tensor.is_floating_point():
        raise ValueError(f"expected {what} [n, D] of 2 pictures at least, got {tensor.dtype} {tuple(tensor.shape)}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(
            f"{what} of {int((~tensor.isfinite()).any(1).sum())} of {len(tensor)} pictures are not finite"
        )
    return tensor.double()


def _two(generated: Features, reference: Features) -> tuple[Tensor, Tensor]:
    x, y = _features(generated, "generated features"), _features(reference, "reference features")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"the features differ in width: {x.shape[1]} and {y.shape[1]}; use one extractor for both")
    return x, y


def _kernel(x: Tensor, y: Tensor, *, diagonal: bool = False) -> float:
    products = (x * y).sum(1) if diagonal else x @ y.T
    return float((products / x.shape[1] + 1).pow(3).sum())


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    return sum((_kernel(rows, y) for rows in x.split(_BLOCK)), 0.0)


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Blocks of rows of the [n, m] distances. By products, which for 2048 features take a tenth of the time that
    differences take; in fp64 this leaves 8 digits of a distance that is not far below the features' length."""
    return (torch.cdist(rows, y, compute_mode="use_mm_for_euclid_dist") for rows in x.split(_BLOCK))


def _radii(features: Tensor, k: int) -> Tensor:
    """[n]: to the k-th nearest other feature. The first of the k + 1 smallest is the distance to itself."""
    return torch.cat([block.kthvalue(k + 1, dim=1).values for block in _distances(features, features)])


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of points in a ball; one on its surface is in it, whatever the last digits say."""
    return float(
        torch.cat([(block <= radii * _SURFACE).any(1) for block in _distances(points, centres)]).double().mean()
    )
