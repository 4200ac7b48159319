# SPDX-License-Identifier: Apache-2.0
"""Folding a DiT block: exact in fp64, whatever the shifts and scales are."""

import pytest
import torch
from support import rebuilt_with_chains, tiny_dit

from diffusers_dq.specs import spec_of
from diffusers_dq.transforms import Chain, Scale, Shift


@pytest.mark.parametrize("step", [5, 400, 900])
@pytest.mark.parametrize("variant", [{}, {"norm_elementwise_affine": True}, {"attention_bias": False}], ids=str)
def test_any_chain_on_every_group_folds_exactly(step, variant):
    model = tiny_dit(**variant).double()
    generator = torch.Generator().manual_seed(0)
    chains = {}
    for group in spec_of(model).groups:
        if group.name.endswith("norm1.linear"):
            continue
        channels = model.get_submodule(group.name).in_features
        shift = torch.randn(3, channels, generator=generator, dtype=torch.float64)
        scale = torch.rand(channels, generator=generator, dtype=torch.float64) * 4 + 0.1
        chains[group.name] = Chain((Shift(shift), Scale(scale)), (100.0, 700.0))
    inputs = dict(
        hidden_states=torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64),
        timestep=torch.tensor([step, step]),
        class_labels=torch.tensor([1, 7]),
    )
    with torch.no_grad():
        expected = model(**inputs).sample
        changed = rebuilt_with_chains(model, chains)(**inputs).sample
    # fp64 keeps 16 digits; two blocks of products of width 32 lose a few
    assert torch.allclose(changed, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def test_every_linear_is_in_a_group_or_stays_in_full_precision():
    model = tiny_dit()
    spec = spec_of(model)
    grouped = [linear for group in spec.groups for linear in group.linears]
    assert len(grouped) == len(set(grouped))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert name in grouped or any(part in name for part in spec.not_converted), name
