# SPDX-License-Identifier: Apache-2.0
"""Folds in the precision that everybody runs: they cost no more than bf16 costs by itself."""

import pytest
import torch
from support import Fixed
from tiny_models import MODELS

from diffusers_dq.config import DQConfig
from diffusers_dq.conversion import Conversion
from diffusers_dq.specs import SPECS, ModulatedNorm, spec_of
from diffusers_dq.transforms import Chain, Scale, Shift

DESCRIBED = {name: tiny for name, tiny in MODELS.items() if SPECS.get(tiny.cls) is not None}


def folded(model, chains):
    conversion = Conversion(
        model, DQConfig("rtn", weight_bits=16, activation_bits=16), None, model.dtype, method=Fixed(chains)
    )
    conversion.build_all(progress=False)
    conversion.finish()
    return model


@pytest.mark.parametrize("tiny", DESCRIBED.values(), ids=DESCRIBED)
def test_dividing_outliers_by_thirty_costs_nothing_in_bf16(tiny):
    """One channel in sixteen is divided by 30, all are shifted: scale' = m scale + (m - 1) would have 29 dB left."""
    exact = tiny.run(tiny.build(), tiny.timesteps[1])
    plain = tiny.build(torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    chains = {}
    for group in spec_of(plain).groups:
        if isinstance(group.producer, ModulatedNorm):
            channels = plain.get_submodule(group.name).in_features
            scale = torch.ones(channels, dtype=torch.float64)
            scale[::16] = 30
            shift = 0.1 * torch.randn(1, channels, generator=generator, dtype=torch.float64)
            chain = Chain((Shift(shift), Scale(scale)))
            chains[group.name] = chain if group.producer.can_carry(chain) else Chain((Scale(scale),))
    alone = (tiny.run(plain, tiny.timesteps[1]).float() - exact).norm()
    error = (tiny.run(folded(plain, chains), tiny.timesteps[1]).float() - exact).norm()
    # each fold rounds the modulation once more; over all layers bf16 rounds some tens of times by itself
    assert error <= 2 * alone
