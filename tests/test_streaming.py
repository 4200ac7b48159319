# SPDX-License-Identifier: Apache-2.0
"""Second moments found block by block, from kept inputs."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline
from support import CALLS, PIXART_CALL, tiny_pixart_pipeline

import diffusers_dq as dq
from diffusers_dq import conversion
from diffusers_dq.replay import Replay, swapped
from diffusers_dq.streaming import unit_moments
from diffusers_dq.timesteps import TimestepGroups


def without_products(statistics: dq.Statistics) -> dq.Statistics:
    """As if calibrated with the defaults."""
    sites = {name: replace(site, products=None, sums=None, counts=None) for name, site in statistics.sites.items()}
    return replace(statistics, sites=sites)


@torch.no_grad()
def test_they_are_the_sums_over_all_tokens_behind_the_layers_in_place(dit_folder, dit_statistics):
    model = DiTPipeline.from_pretrained(dit_folder).transformer
    site, earlier = "transformer_blocks.1.ff.net.0.proj", "transformer_blocks.0.ff.net.2"
    other = torch.nn.Linear(128, 32)
    replay = Replay(model, dit_statistics, TimestepGroups(), [()])
    found = unit_moments(replay, "transformer_blocks.1", [site], {earlier: other})[site]

    seen = []
    hook = model.get_submodule(site).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with swapped(model, {earlier: other}):
        for sample in dit_statistics.samples:
            model(**sample)
    hook.remove()
    x = torch.cat(seen)
    # fp32 sums in another order
    assert torch.allclose(found.products, x.T @ x, rtol=1e-4, atol=1e-3)
    assert torch.allclose(found.sums.sum(0), x.sum(0), rtol=1e-4, atol=1e-3)
    assert int(found.counts.sum()) == len(x)
    by_step = [float(sample["timestep"].max()) for sample in dit_statistics.samples]
    assert found.timesteps.tolist() == sorted(set(by_step))


@pytest.mark.parametrize("method", ["rtn", "htg", "viditq"])
@torch.no_grad()
def test_gptq_works_with_what_every_calibration_keeps(method, dit_folder, dit_statistics, run_dit):
    """Random weights: inputs have little in common, so the gain is small."""
    full = run_dit(DiTPipeline.from_pretrained(dit_folder).transformer)
    errors = {}
    for rounding, statistics in (
        ("nearest", dit_statistics),
        ("gptq", without_products(dit_statistics)),
        ("gptq, all tokens", dit_statistics),
    ):
        pipe = DiTPipeline.from_pretrained(dit_folder)
        config = dq.DQConfig(method, weight_bits=4, rounding=rounding.split(",")[0])
        dq.quantize(pipe, config, statistics=statistics, progress=False)
        errors[rounding] = float((run_dit(pipe.transformer) - full).norm())
    print(f"\n{method}: {errors}")
    assert errors["gptq"] < 0.95 * errors["nearest"]
    assert errors["gptq"] < 1.15 * errors["gptq, all tokens"]


def test_one_units_moments_are_in_memory_at_a_time(dit_folder, dit_statistics, monkeypatch):
    held = []
    spill = conversion.spill

    def counted(layer):
        held.append(sum(plan.moments is not None for plan in running[0].plan.linears.values()))
        spill(layer)

    running = []
    build_all = conversion.Conversion.build_all
    monkeypatch.setattr(conversion, "spill", counted)
    monkeypatch.setattr(
        conversion.Conversion, "build_all", lambda self, progress: (running.append(self), build_all(self, progress))
    )
    pipe = DiTPipeline.from_pretrained(dit_folder)
    config = dq.DQConfig("rtn", weight_bits=4, rounding="gptq")
    dq.quantize(pipe, config, statistics=without_products(dit_statistics), progress=False)
    assert set(held) == {7}, "the linears of one block"


def test_text_models_whose_prompt_all_blocks_read():
    pipe = tiny_pixart_pipeline()
    statistics = dq.calibrate(pipe, [PIXART_CALL], num_inference_steps=4, samples=4, progress=False)
    report = dq.quantize(
        pipe,
        dq.DQConfig("rtn", rounding="gptq", modules_to_not_convert=["proj_out"]),
        statistics=statistics,
        progress=False,
    )
    assert any("attn2.to_k" in row.name and row.bits == "W8A8" for row in report.linears)


@pytest.mark.parametrize(
    "config", [dict(method="htg", rounding="gptq"), dict(preset="speed"), dict(preset="quality")], ids=str
)
def test_timestep_groups_that_hold_no_kept_sample(config, dit_folder):
    """10 groups of 10 steps and 4 samples: the outputs are corrected as at the nearest step."""
    pipe = DiTPipeline.from_pretrained(dit_folder)
    statistics = dq.calibrate(pipe, CALLS, num_inference_steps=10, samples=4, progress=False)
    groups = {} if config.get("preset") == "quality" else dict(groups=10)
    dq.quantize(pipe, dq.DQConfig(**config, **groups, weight_bits=4), statistics=statistics, progress=False)
    tensors = {name: t for name, t in pipe.transformer.state_dict().items() if name != "timestep_boundaries"}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
