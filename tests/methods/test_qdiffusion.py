# SPDX-License-Identifier: Apache-2.0
"""Q-Diffusion: ranges against its search written out, and what learning may change."""

import pytest
import torch
from diffusers import DiTPipeline

import diffusers_dq as dq
from diffusers_dq.conversion import Conversion
from diffusers_dq.reconstruction import Reconstructor


def conversion(folder, statistics, **config) -> Conversion:
    model = DiTPipeline.from_pretrained(folder).transformer
    settings = dict(weight_bits=4, reconstruction=dict(iterations=5))
    return Conversion(model, dq.DQConfig("qdiffusion", **{**settings, **config}), statistics, torch.float32)


def test_its_recipe_is_the_papers():
    recipe = dq.DQConfig("qdiffusion").recipe
    assert (recipe.search, recipe.rounding, recipe.group_size) == ("mse", "adaround", 0)


@pytest.mark.parametrize("name", ["attn1.to_q", "attn1.to_out.0", "ff.net.2"])
def test_the_input_range_is_the_best_of_eighty_shrunken_ones(name, dit_folder, dit_statistics):
    """(1 - 0.01 i) of the full range, i = 0 ... 79, by the sum of |x - x^|^2.4 over the sampled tokens."""
    name = f"transformer_blocks.0.{name}"
    found = conversion(dit_folder, dit_statistics).plan.linears[name].input_range
    site = dit_statistics.input_of(name)
    x = site.tokens.float().flatten()
    low, high = site.minimum.min(), site.maximum.max()
    errors, candidates = [], []
    for i in range(80):
        scale = (high - low) * (1 - 0.01 * i) / 255
        zero = -128 - torch.round(low * (1 - 0.01 * i) / scale)
        q = (torch.round(x / scale) + zero).clamp(-128, 127)
        errors.append(((q - zero) * scale - x).abs().pow(2.4).sum())
        candidates.append((scale, zero))
    best = errors[int(torch.stack(errors).argmin())]
    chosen = next(i for i, (s, _) in enumerate(candidates) if torch.isclose(s, found.scale, rtol=1e-5))
    assert errors[chosen] <= best * (1 + 1e-4), "ties and fp32 sums aside"
    assert found.zero_point == candidates[chosen][1]


def test_every_weight_is_rounded_up_or_down(dit_folder, dit_statistics, monkeypatch):
    """AdaRound decides between the two neighbours; what the search clipped stays at the end of the range."""
    monkeypatch.setattr(Reconstructor, "_error", lambda self, *args: next(falling))  # so that what was learned is kept
    falling = iter(range(1000, 0, -1))
    done = conversion(dit_folder, dit_statistics, reconstruction=dict(iterations=30, learning_rate=0.1))
    done.reconstruct(None, progress=False)
    moved = 0
    for name, plan in done.plan.linears.items():
        weight, q = done.model.get_submodule(name).weight, plan.decided.integers
        exact = (weight / plan.decided.scale[:, None]).clamp(-8, 7)
        assert ((q - exact).abs() < 1).all(), name
        moved += int((q != exact.round()).sum())
    assert moved > 0
