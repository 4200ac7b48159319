# SPDX-License-Identifier: Apache-2.0
"""A sample of the weights, by which the checkpoint that statistics were taken on is known again."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_TENSORS = 256  # of matrices, and of the others


def fingerprint_of(model: nn.Module) -> Tensor:
    """Four values each of up to 256 matrices spread over the model, then of up to 256 biases, tables of norms and the
    like, [2048 at most] fp32: the same in any float dtype up to its rounding."""
    floating = [p for _, p in sorted(model.named_parameters()) if p.is_floating_point() and p.numel()]
    matrices, vectors = [p for p in floating if p.ndim >= 2], [p for p in floating if p.ndim < 2]
    return torch.cat([_sampled(matrices), _sampled(vectors)])


def _sampled(parameters: Sequence[Tensor]) -> Tensor:
    stride = max(1, -(-len(parameters) // _TENSORS))
    samples = []
    for parameter in parameters[::stride]:
        flat = parameter.detach().flatten()
        places = torch.linspace(0, flat.numel() - 1, 4, dtype=torch.float64).long()
        samples.append(flat[places.to(flat.device)].float().cpu())
    return torch.cat(samples) if samples else torch.empty(0)


def check_fingerprint(taken: Tensor, model: nn.Module, known: str | None) -> None:
    """Raises ValueError unless `taken`, [F] fp32 of a model of class `known`, is of these weights in any dtype."""
    fingerprint = fingerprint_of(model)
    matrices = sum(p.ndim >= 2 and p.is_floating_point() for p in model.parameters())
    if len(taken) == 4 * -(-matrices // max(1, -(-matrices // _TENSORS))):
        fingerprint = fingerprint[: len(taken)]  # as earlier versions took it, of matrices only
    if fingerprint.shape != taken.shape:
        raise ValueError(
            f"the statistics are of a {known} of another size ({len(taken)} fingerprint values, this"
            f" model has {len(fingerprint)}): calibrate this model"
        )
    # bf16 keeps 8 bits: two roundings of one weight differ by at most 2^-8 of it.
    if not torch.allclose(fingerprint, taken, rtol=2**-7, atol=1e-6):
        raise ValueError(
            f"the statistics were taken on a {known} with other weights than this one's: calibrate this"
            " checkpoint, or load the one the statistics belong to"
        )
