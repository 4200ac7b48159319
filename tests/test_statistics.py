# SPDX-License-Identifier: Apache-2.0
"""Statistics of shares of the calls, merged, are those of all calls."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, DPMSolverMultistepScheduler
from support import tiny_pipeline
from tiny_pipelines import PIPELINES

import diffusers_dq as dq
from diffusers_dq.statistics import SiteStatistics

CALLS = [dict(class_labels=[i, i + 1], guidance_scale=1.5) for i in (1, 3, 5, 7, 9)]


def calibrated(first: int, last: int, pipe=None, **changes) -> dq.Statistics:
    arguments = dict(num_inference_steps=3, seed=first, second_moments=True, samples=6, progress=False) | changes
    return dq.calibrate(pipe or tiny_pipeline(), CALLS[first:last], **arguments)


@pytest.fixture(scope="module")
def parts() -> list[dq.Statistics]:
    return [calibrated(0, 2), calibrated(2, 3), calibrated(3, 5)]


def assert_same(one: dq.Statistics, other: dq.Statistics) -> None:
    assert one.about == other.about and list(one.sites) == list(other.sites)
    assert torch.equal(one.timesteps, other.timesteps)
    for name, site in one.sites.items():
        for key, tensor in site.tensors().items():
            assert torch.equal(tensor, other.sites[name].tensors()[key]), (name, key)
    assert len(one.samples) == len(other.samples)


def test_parts_merged_are_one_calibration_of_all_calls(parts):
    merged, whole = dq.Statistics.merge(parts), calibrated(0, 5)
    assert torch.equal(merged.timesteps, whole.timesteps) and merged.sites.keys() == whole.sites.keys()
    for name, site in merged.sites.items():
        of_whole = whole.sites[name]
        assert site.linears == of_whole.linears
        assert torch.equal(site.minimum, of_whole.minimum) and torch.equal(site.maximum, of_whole.maximum)
        if site.products is not None:
            assert torch.equal(site.counts, of_whole.counts)
            # the same fp32 terms in another order: a few hundred of them, each sum off by 2^-24 of the largest
            torch.testing.assert_close(site.sums, of_whole.sums, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(site.products, of_whole.products, rtol=1e-4, atol=1e-3)
    kept = {key: value for key, value in merged.about.items() if key != "samples"}
    assert kept == {key: value for key, value in whole.about.items() if key != "samples"}
    assert merged.about["samples"] == 3 * 6 and len(merged.samples) == sum(len(part.samples) for part in parts)


def test_they_quantize_as_those_of_one_calibration_do(parts):
    pipe = tiny_pipeline()
    report = dq.quantize(pipe, dq.DQConfig("htg", rounding="gptq"), statistics=dq.Statistics.merge(parts))
    assert report.quantized


def test_the_order_of_the_parts_does_not_matter(parts):
    assert_same(dq.Statistics.merge(parts), dq.Statistics.merge(parts[::-1]))
    assert_same(dq.Statistics.merge(parts[:1]), parts[0])


def test_what_is_merged_is_saved_and_loaded(parts, tmp_path):
    merged = dq.Statistics.merge(parts)
    merged.save(tmp_path / "merged.safetensors")
    assert_same(dq.Statistics.load(tmp_path / "merged.safetensors"), merged)


def site(seed: int, tokens: int, unvisited: int | None = None) -> SiteStatistics:
    """Of two steps and three channels; the token with key k is [k, k, k]."""
    keys = torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed)).sort(dim=1).values
    low, high = torch.full((2, 3), -float(seed)), torch.full((2, 3), float(seed))
    values = keys[:, :, None].expand(-1, -1, 3).clone()
    if unvisited is not None:
        low[unvisited], high[unvisited] = torch.inf, -torch.inf
        keys[unvisited], values[unvisited] = 1.0, 0.0
    return SiteStatistics(("linear",), low, high, values.bfloat16(), keys)


def test_the_tokens_with_the_smallest_keys_of_all_parts_are_kept():
    merged = SiteStatistics.merged([site(1, 8), site(2, 5), site(3, 8)])
    everything = torch.cat([site(1, 8).keys, site(2, 5).keys, site(3, 8).keys], dim=1).sort(dim=1).values
    assert torch.equal(merged.keys, everything[:, :5])
    assert torch.equal(merged.tokens, merged.keys[:, :, None].expand(-1, -1, 3).bfloat16())
    assert torch.equal(merged.maximum, torch.full((2, 3), 3.0)) and torch.equal(merged.minimum, -merged.maximum)


def test_a_step_that_one_part_did_not_visit_is_the_other_parts():
    merged = SiteStatistics.merged([site(1, 4, unvisited=0), site(2, 4)])
    assert torch.equal(merged.keys[0], site(2, 4).keys[0]) and torch.equal(merged.tokens[0], site(2, 4).tokens[0])
    assert merged.visited.all() and torch.equal(merged.maximum[0], torch.full((3,), 2.0))


def test_a_site_that_one_part_did_not_reach_is_the_other_parts(parts):
    name = next(iter(parts[1].sites))
    without = replace(parts[1], sites={key: value for key, value in parts[1].sites.items() if key != name})
    merged = dq.Statistics.merge([parts[0], without])
    assert torch.equal(merged.sites[name].maximum, parts[0].sites[name].maximum)


class WithoutASpec(DiTTransformer2DModel):
    """Of which groups of linears are discovered, as calls reach them."""


def without_query(attention, hidden_states, **others):
    """An attention processor that does not reach the first linear of its group."""
    return attention.to_out[0](attention.to_k(hidden_states) + attention.to_v(hidden_states))


def without_value(attention, hidden_states, **others):
    return attention.to_out[0](attention.to_q(hidden_states) + attention.to_k(hidden_states))


@pytest.mark.parametrize("processor, odd", [(without_query, "to_k"), (without_value, "to_q")])
def test_groups_that_were_discovered_otherwise_are_refused(processor, odd):
    pipes = [tiny_pipeline(), tiny_pipeline()]
    for pipe in pipes:
        pipe.transformer.__class__ = WithoutASpec
    pipes[1].transformer.transformer_blocks[0].attn1.set_processor(processor)
    found = [calibrated(i, i + 1, pipe) for i, pipe in enumerate(pipes)]
    message = f"blocks.0.attn1.{odd} shares its input with .* WithoutASpec has no spec.*calls that reach all"
    with pytest.raises(ValueError, match=message):
        dq.Statistics.merge(found)
    assert dq.Statistics.merge([found[0], calibrated(1, 2, pipes[0])]).sites.keys() == found[0].sites.keys()


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: calibrated(2, 3, tiny_pipeline(seed=1)), "different weights"),
        (lambda: calibrated(2, 3, num_inference_steps=4), "num_inference_steps.*3 and 4"),
        (lambda: calibrated(2, 3, second_moments=False), "second_moments"),
        (lambda: calibrated(2, 3, with_scheduler(DPMSolverMultistepScheduler())), "scheduler"),
        (lambda: calibrated(2, 3, with_scheduler(DDIMScheduler(steps_offset=1))), "scheduler"),
        (lambda: calibrated(2, 3, seed=1), "seeds 0 and 1 drew the same noise.*2 calls"),
        (lambda: replace(calibrated(2, 3), timesteps=torch.tensor([9.0, 8.0, 7.0])), "other timesteps"),
    ],
    ids=["weights", "steps", "moments", "scheduler", "settings", "seed", "timesteps"],
)
def test_what_does_not_belong_together_is_refused(parts, other, message):
    with pytest.raises(ValueError, match=message):
        dq.Statistics.merge([parts[0], other()])


def test_how_a_scheduler_was_made_does_not_matter(parts):
    loaded = DDIMScheduler.from_config(dict(DDIMScheduler().config))  # its config remembers what was given, in a set
    assert dq.Statistics.merge([parts[0], calibrated(2, 3, with_scheduler(loaded))]).about["calls"] == 3


def test_an_expanded_timestep_is_kept_in_a_file(tmp_path):
    path = tmp_path / "wan.safetensors"
    tiny = PIPELINES["Wan"]  # passes t.expand(batch), which for one video has a stride of 0
    dq.calibrate(tiny.build(), [tiny.call], num_inference_steps=2, checkpoint=path, progress=False)
    assert dq.Statistics.load(path).samples[0]["timestep"].shape == (1,)


@pytest.mark.parametrize("name, descending", [("Z-Image", False), ("Wan", True)])
def test_one_step_falls_or_rises_as_the_spec_says(name, descending, tmp_path):
    tiny = PIPELINES[name]
    statistics = dq.calibrate(tiny.build(), [tiny.call], num_inference_steps=1, progress=False)
    assert len(statistics.timesteps) == 1 and statistics.descending == descending
    statistics.save(tmp_path / "one.safetensors")
    assert dq.Statistics.load(tmp_path / "one.safetensors").descending == descending
    assert dq.Statistics.merge([statistics]).descending == descending


@pytest.mark.parametrize("timesteps, descending", [([0.0, 0.5], False), ([900.0, 30.0], True)])
def test_what_a_schedule_shows_counts_more(timesteps, descending, parts):
    other = replace(parts[0], timesteps=torch.tensor(timesteps), about={"descending": not descending})
    assert other.descending == descending


def test_no_parts_and_another_linear_are_refused():
    with pytest.raises(ValueError, match="no statistics"):
        dq.Statistics.merge([])
    with pytest.raises(ValueError, match="read by"):
        SiteStatistics.merged([site(1, 4), replace(site(2, 4), linears=("another",))])


def with_scheduler(scheduler):
    pipe = tiny_pipeline()
    pipe.scheduler = scheduler
    return pipe
