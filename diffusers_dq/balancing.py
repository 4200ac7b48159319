# SPDX-License-Identifier: Apache-2.0
"""How much of a channel's size a linear's weight takes over from its input. K in_features, S steps."""

import torch
from torch import Tensor

ALPHAS = tuple(i / 10 for i in range(11))  # that a search for the best one tries


def check_alpha(alpha: float | None) -> None:
    """None is to be searched. Raises ValueError."""
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, or None to be searched; got {alpha}")


def balance(input_max: Tensor, weight_max: Tensor, alpha: float = 0.5) -> Tensor:
    """s_k = input_max_k^alpha / weight_max_k^(1 - alpha), by which the input is divided.

    SmoothQuant (arXiv 2211.10438), Eq. 4. With alpha = 1/2 channel k of input and weight end up equally large, at
    sqrt(input_max_k weight_max_k).
    input_max, weight_max: [K], largest absolute values.   Returns [K]; 1 for a channel that is always zero or that no
    weight reads.
    """
    dead = (input_max <= 0) | (weight_max <= 0)
    tiny = torch.finfo(input_max.dtype).tiny
    s = input_max.clamp(min=tiny) ** alpha / weight_max.clamp(min=tiny) ** (1 - alpha)
    return torch.where(dead, torch.ones_like(s), s)


def spearman(rows: Tensor, reference: Tensor) -> Tensor:
    """Spearman's rank correlation of each row with the reference: Pearson's of their ranks, ties by average rank.

    rows: [S, K].   reference: [K].   Returns [S] in [-1, 1], fp64; 0 where a row or the reference is constant.
    """
    centred = [ranks - ranks.mean(-1, keepdim=True) for ranks in (_ranks(rows), _ranks(reference[None]))]
    products = (centred[0] * centred[1]).sum(-1)
    norms = centred[0].norm(dim=-1) * centred[1].norm(dim=-1)
    return torch.where(norms > 0, products / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0.0)


def _ranks(rows: Tensor) -> Tensor:
    """[S, K] fp64, from 0; equal values share the average of the ranks they take up."""
    ranks = []
    for row in rows:
        _, which, count = row.unique(return_inverse=True, return_counts=True)
        last = count.cumsum(0).double() - 1
        ranks.append((last - (count - 1) / 2)[which])
    return torch.stack(ranks)
