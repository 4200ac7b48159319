# SPDX-License-Identifier: Apache-2.0
"""PTQD as a method: static ranges of least error, and the correction that test_noise_correction.py is about."""

import pytest
import torch
from diffusers import DiTPipeline

import diffusers_dq as dq


def quantized(folder, statistics, *args, **config) -> torch.nn.Module:
    pipe = DiTPipeline.from_pretrained(folder)
    dq.quantize(pipe, dq.DQConfig(*args, **config), statistics=statistics, progress=False)
    return pipe.transformer


def test_without_its_correction_it_is_static_rounding_with_searched_ranges(dit_folder, dit_statistics, run_dit):
    model = quantized(dit_folder, dit_statistics, "ptqd", noise_correction=False)
    plain = quantized(dit_folder, dit_statistics, "rtn", dynamic=False, search="mse")
    assert torch.equal(run_dit(model), run_dit(plain))
    assert not hasattr(model, "noise_correction")


@pytest.mark.parametrize("method", ["rtn", "svdquant", "htg"])
def test_its_correction_goes_with_any_method(method, dit_folder, dit_statistics):
    model = quantized(dit_folder, dit_statistics, method, weight_bits=4, noise_correction=True)
    assert model.noise_correction.mean.shape == (10, 4)
    assert (model.noise_correction.variance > 0).all() and model.noise_correction.slope.any()


@torch.no_grad()
def test_the_fitted_variance_is_that_of_what_is_left(dit_folder, dit_statistics):
    """Var[r] / (1 + k)^2 of each channel of the corrected prediction, worked out again from the kept inputs."""
    full = DiTPipeline.from_pretrained(dit_folder).transformer
    model = quantized(dit_folder, dit_statistics, "ptqd", weight_bits=4)
    tables = model.noise_correction
    for i, t in enumerate(tables.timesteps.tolist()):
        samples = [s for s in dit_statistics.samples if float(s["timestep"].max()) == t]
        left = torch.cat([model(**s).sample - full(**s).sample for s in samples]).double()
        # corrected - exact = (r - E[r]) / (1 + k)
        wanted = tables.variance[i] / (1 + tables.slope[i]).square()
        assert torch.allclose(left.var(dim=(0, 2, 3), correction=0).float(), wanted, rtol=1e-3)
