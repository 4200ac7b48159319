# SPDX-License-Identifier: Apache-2.0
"""GPTQ (Frantar et al., ICLR 2023; arXiv 2210.17323): columns are rounded one after the other, and what rounding has
done to one is made up for by those to come, by what the inputs have in common.

Notation: W [N, K] the weight, H [K, K] the sum of x x^T over inputs x, each of length K.
"""

import torch
from torch import Tensor

from diffusers_dq import affine
from diffusers_dq.affine import QuantizedWeight, RangeSearch
from diffusers_dq.scheme import QuantScheme

BLOCK = 128
DAMPING = 0.01
_MOST_DAMPING = 10.0


def quantize_weight_gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: QuantScheme,
    search: RangeSearch = "minmax",
    *,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> QuantizedWeight:
    """Round a weight such that sum |x (W - W^)^T|^2 over the inputs is small (Eq. 1), column by column (Eq. 2 and 3).

    weight: [N, K].   hessian: [K, K], positive semidefinite, in any units.
    scheme: "channel" or "group"; the range of a channel is that of W, the range of a group that of its columns once
        all before them have been rounded.
    damping: share of the mean of H's diagonal that is added to it (section 3.3).
    block: columns whose updates of the rest are put off and made at once.
    Raises ValueError where the group size does not divide K, or H has another size or is not finite.
    """
    n, k = weight.shape
    size = scheme.group_size or k
    if k % size:
        raise ValueError(f"group_size must divide the {k} in_features, got {size}")
    if hessian.shape != (k, k) or not torch.isfinite(hessian).all():
        raise ValueError(f"hessian must be finite and [{k}, {k}], got {list(hessian.shape)}")
    inverse = _inverse_factor(hessian, damping)
    w = weight.float().clone()
    q = torch.empty(n, k, dtype=torch.int8, device=w.device)
    ranges = []
    for start in range(0, k, size):
        stop = start + size
        found = affine.weight_ranges(w[:, start:stop], scheme, search)
        ranges.append(found)
        for first in range(start, stop, block):
            columns = slice(first, min(first + block, stop))
            q[:, columns], errors = _round_block(w[:, columns], inverse[columns, columns], *found, scheme)
            w[:, columns.stop :] -= errors @ inverse[columns, columns.stop :]
    scale, zero_point = (torch.stack(parts, dim=1) for parts in zip(*ranges, strict=True))
    if scheme.granularity != "group":
        return QuantizedWeight(q, scale[:, 0])
    return QuantizedWeight(q, scale, None if scheme.symmetric else zero_point.to(torch.int8))


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U [K, K] fp32, upper triangular, with H^-1 = U^T U, of H with its diagonal damped.

    An input that is always zero has no say: its row and column of H become those of a multiple of the unit matrix.
    Where sums in fp32 have left H indefinite, the damping grows tenfold until it is not.
    """
    h = hessian.double().clone()
    diagonal = h.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    diagonal[dead] = mean
    diagonal += damping * mean
    factor, failed = torch.linalg.cholesky_ex(h)
    while failed and damping < _MOST_DAMPING:
        diagonal += 9 * damping * mean
        damping *= 10
        factor, failed = torch.linalg.cholesky_ex(h)
    if failed:
        raise ValueError("hessian is far from positive semidefinite: it is no sum of x x^T")
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()


def _round_block(
    w: Tensor, inverse: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme
) -> tuple[Tensor, Tensor]:
    """(integers [N, B] int8, errors [N, B]) of some columns w [N, B]; each column's error changes the later ones."""
    w = w.clone()
    q = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    errors = torch.empty_like(w)
    for i in range(w.shape[1]):
        q[:, i] = affine.quantize(w[:, i], scale, zero_point, scheme)
        errors[:, i] = (w[:, i] - affine.dequantize(q[:, i], scale, zero_point)) / inverse[i, i]
        w[:, i + 1 :] -= errors[:, i, None] * inverse[i, i + 1 :]
    return q, errors
