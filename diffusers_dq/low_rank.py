# SPDX-License-Identifier: Apache-2.0
"""The part of a weight that few directions hold (SVDQuant, Li et al., ICLR 2025; arXiv 2411.05007)."""

import torch
from torch import Tensor


def is_worth_it(rank: int, shape: torch.Size) -> bool:
    """Whether the factors are smaller than the weight [N, K]."""
    return 0 < rank * sum(shape) < shape.numel()


def approximate_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`low_rank_factors` within a percent or so of their error, for trials: a tenth of the time for a wide weight.

    By random projections (torch.svd_lowrank) from a seed of their own.
    """
    state = torch.default_generator.get_state()  # of the CPU alone: torch.manual_seed would reseed GPUs as well
    try:
        torch.default_generator.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight.float().cpu(), min(rank, *weight.shape), niter=3)
    finally:
        torch.default_generator.set_state(state)
    return v.T.to(weight), (u * s).to(weight)


def low_rank_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(D [r, K], U [N, r]) such that U D is the best approximation of weight [N, K] of that rank (Eckart and Young).

    In fp64, of the weight's dtype; r is at most min(N, K). From the eigenvectors of the smaller of W^T W and W W^T,
    which for a few leading directions are as good as those of a decomposition of W, and much quicker.
    """
    w = weight.double()
    if w.shape[0] < w.shape[1]:
        down, up = low_rank_factors(weight.T, rank)
        return up.T, down.T
    _, vectors = torch.linalg.eigh(w.T @ w)  # ascending
    leading = vectors[:, -rank:]  # [K, r]
    return leading.T.to(weight.dtype), (w @ leading).to(weight.dtype)
