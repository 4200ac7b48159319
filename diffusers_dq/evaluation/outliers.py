# SPDX-License-Identifier: Apache-2.0
"""Give a model the channel outliers of a large one without changing what it computes: a hard case from an easy one.

DiT-XL/2 and its like have a few channels that are tens of times larger than the rest (HTG, Fig. 1); small models that
are trained for tests do not.
"""

import torch
from torch import nn

from diffusers_dq.specs import ModulatedNorm, spec_of
from diffusers_dq.transforms import Chain, Scale


@torch.no_grad()
def inject_outliers(model: nn.Module, *, channels: int = 4, factor: float = 40.0, seed: int = 0) -> None:
    """Multiply `channels` random channels of each modulated norm's output by `factor`, in place; divide the columns
    that read them: the function stays the same, up to the rounding of the model's dtype.

    Raises ValueError for an architecture whose spec knows no norm that a linear of its own modulates.
    """
    generator = torch.Generator().manual_seed(seed)
    found = False
    for group in spec_of(model).groups:
        if not isinstance(group.producer, ModulatedNorm) or not isinstance(group.producer.source, str):
            continue
        found = True
        linears = [_linear(model, name) for name in group.linears]
        width = linears[0].in_features
        scale = torch.ones(width, dtype=torch.float64)
        scale[torch.randperm(width, generator=generator)[:channels]] = 1 / factor
        for linear in linears:
            linear.weight.mul_(scale)
        for update in group.producer.updates(Chain((Scale(scale),)), width):
            modulation, rows = _linear(model, group.producer.source), slice(update.start, update.stop)
            modulation.weight[rows] *= update.multiplier[:, None]
            modulation.bias[rows] = modulation.bias[rows] * update.multiplier + update.offset[0]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no norm that a linear of its own modulates, as far as a spec knows: there"
            " is no place for outliers"
        )


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear
