# SPDX-License-Identifier: Apache-2.0
"""Which steps PTQ4DM calibrates on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dq.skewed_steps import draw_steps

FALLING = torch.arange(1000).flip(0).float()


def shares(drawn: torch.Tensor) -> torch.Tensor:
    """Of the steps drawn, as shares of the schedule from its clean end, the last in the order of denoising."""
    return (len(drawn) - 1 - drawn.nonzero().flatten()) / (len(drawn) - 1)


@given(steps=st.integers(1, 50), mean=st.floats(0, 1), draws=st.integers(1, 99), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_some_steps_are_drawn_and_the_same_for_a_seed(steps, mean, draws, seed):
    timesteps = torch.arange(steps).flip(0).float()
    drawn = draw_steps(timesteps, mean, 0.2, draws, seed)
    assert drawn.dtype == torch.bool and drawn.shape == (steps,)
    assert 1 <= drawn.sum() <= min(steps, draws)
    torch.rand(3)  # whatever the global generator has been used for
    assert torch.equal(draw_steps(timesteps, mean, 0.2, draws, seed), drawn)


def test_another_seed_draws_others():
    assert not torch.equal(draw_steps(FALLING, 0.4, 0.2, 64, 0), draw_steps(FALLING, 0.4, 0.2, 64, 1))


@pytest.mark.parametrize("mean", [0.3, 0.4, 0.5])
def test_they_lie_about_the_mean(mean):
    """Of 40 draws of which hardly two fall on one step, over 50 seeds: five standard errors."""
    drawn = [shares(draw_steps(FALLING, mean, 0.1, 40, seed)) for seed in range(50)]
    everything = torch.cat(drawn)
    assert abs(everything.mean() - mean) < 5 * 0.1 / math.sqrt(len(everything))
    assert abs(everything.std() - 0.1) < 5 * 0.1 / math.sqrt(2 * len(everything))


@pytest.mark.parametrize(("mean", "end"), [(0.0, 0.0), (1.0, 1.0)])
def test_draws_beyond_the_schedule_fall_on_its_end(mean, end):
    """Half of them are beyond: each seed's draws hold the end itself."""
    for seed in range(10):
        assert end in shares(draw_steps(FALLING, mean, 0.2, 40, seed))


def test_the_clean_end_is_where_denoising_ends_also_where_timesteps_rise():
    """Lumina and Z-Image count from 0, noise, to 1."""
    rising = torch.linspace(0, 1, 1000)
    drawn = draw_steps(rising, 0.1, 0.02, 30, 0)
    assert torch.equal(drawn, draw_steps(FALLING, 0.1, 0.02, 30, 0))
    assert rising[drawn].min() > 0.8
    assert FALLING[drawn].max() < 200


def test_a_schedule_of_one_step():
    assert draw_steps(torch.tensor([500.0]), 0.4, 0.2, 64, 0).tolist() == [True]
