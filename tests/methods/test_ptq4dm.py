# SPDX-License-Identifier: Apache-2.0
"""PTQ4DM: what its ranges are found on."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline

import diffusers_dq as dq
from diffusers_dq.conversion import Conversion
from diffusers_dq.methods import METHODS
from diffusers_dq.skewed_steps import draw_steps

OPTIONS = dict(draws=4, seed=3)


def drawn_of(method: str, timesteps: torch.Tensor, **options) -> torch.Tensor:
    cls = METHODS[method]
    return cls(cls.Options(**options)).calibration_steps(timesteps)


def ranges(folder, statistics, method="ptq4dm", **options):
    model = DiTPipeline.from_pretrained(folder).transformer
    plan = Conversion(model, dq.DQConfig(method, **options), statistics, torch.float32).plan
    found = {name: linear.input_range for name, linear in plan.linears.items() if linear.input_range}
    return {name: (float(found.scale), int(found.zero_point)) for name, found in found.items()}


def louder(statistics, steps: torch.Tensor):
    """Inputs ten times as large at some steps."""
    factor = torch.where(steps, 10.0, 1.0)[:, None]

    def changed(site):
        tokens = (site.tokens * factor[..., None]).bfloat16()
        return replace(site, minimum=site.minimum * factor, maximum=site.maximum * factor, tokens=tokens)

    return replace(statistics, sites={name: changed(site) for name, site in statistics.sites.items()})


@pytest.mark.parametrize("method", ["ptq4dm", "g4w_p4a"])
def test_only_drawn_steps_count(method, dit_folder, dit_statistics):
    drawn = drawn_of(method, dit_statistics.timesteps, **OPTIONS)
    assert 1 <= drawn.sum() <= 4
    found = ranges(dit_folder, dit_statistics, method, **OPTIONS)
    assert found and found == ranges(dit_folder, louder(dit_statistics, ~drawn), method, **OPTIONS)
    of_drawn = ranges(dit_folder, louder(dit_statistics, drawn), method, **OPTIONS)
    assert all(of_drawn[name][0] > 5 * scale for name, (scale, _) in found.items())


@pytest.mark.parametrize("method", ["ptq4dm", "g4w_p4a"])
def test_its_options_are_those_of_the_draw(method):
    timesteps = torch.arange(200).flip(0).float()
    options = dict(mean=0.3, deviation=0.1, draws=20, seed=5)
    assert torch.equal(drawn_of(method, timesteps, **options), draw_steps(timesteps, *options.values()))
    drawn = drawn_of(method, timesteps)
    assert timesteps[drawn].mean() < 100, "nearer to the clean picture"


@pytest.mark.parametrize("method", ["ptq4dm", "g4w_p4a"])
@pytest.mark.parametrize("wrong", [dict(mean=-0.1), dict(mean=1.1), dict(deviation=0.0), dict(draws=0)], ids=str)
def test_draws_that_make_no_sense_are_refused(method, wrong):
    with pytest.raises(ValueError, match=r"mean must be in \[0, 1\], deviation above 0 and draws at least 1"):
        dq.DQConfig(method, **wrong)
