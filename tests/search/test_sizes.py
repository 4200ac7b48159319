# SPDX-License-Identifier: Apache-2.0
import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from support import CALLS, PIXART_CALL, tiny_pipeline, tiny_pixart_pipeline

import diffusers_dq as dq
from diffusers_dq import search
from diffusers_dq.denoise import run_call
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.search.fitness import TrajectoryError
from diffusers_dq.search.running import final_latents, with_transformer

CONFIG = dq.DQConfig("qdit", 4, 8)
RUN = dict(num_inference_steps=3, seed=2, progress=False)
SEARCH = dict(**RUN, limit=search.BitOpsOf(64), population=6, parents=3, generations=2)


@pytest.fixture(scope="module")
def pipe():
    """Widths 128 and 512."""
    return tiny_pipeline(num_attention_heads=8)


@pytest.fixture(scope="module")
def statistics(pipe):
    return dq.calibrate(pipe, CALLS, num_inference_steps=3, second_moments=True, progress=False)


@pytest.fixture(scope="module")
def found(pipe, statistics):
    return search.search_group_sizes(pipe, CONFIG, CALLS, statistics=statistics, **SEARCH)


def sizes_of(config):
    return {name: override["group_size"] for name, override in config.overrides.items()}


def converted(pipe, config, **rest):
    private = with_transformer(pipe, copy.deepcopy(pipe.transformer))
    return private, dq.quantize(private, config, progress=False, **rest)


def test_every_linear_gets_a_legal_size_and_those_of_one_input_the_same(pipe, found):
    sizes = sizes_of(found)
    _, report = converted(pipe, CONFIG)
    assert sizes.keys() == {row.name for row in report.quantized}
    assert set(sizes.values()) <= {32, 64, 128} and len(set(sizes.values())) > 1
    assert sizes["transformer_blocks.0.attn1.to_q"] == sizes["transformer_blocks.0.attn1.to_v"]


def test_the_result_goes_through_a_file_into_a_pipeline_that_reloads_the_same(pipe, found, tmp_path):
    found.to_json_file(tmp_path / "found.json")
    quantized, _ = converted(pipe, tmp_path / "found.json")
    layers = {n: m.layout.group_size for n, m in quantized.transformer.named_modules() if type(m) is QuantizedLinear}
    assert layers == sizes_of(found)
    expected = run_call(quantized, CALLS[0], num_inference_steps=3, seed=7, output_type="np")
    quantized.save_pretrained(tmp_path / "pipe")
    again = DiTPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert (run_call(again, CALLS[0], num_inference_steps=3, seed=7, output_type="np") == expected).all()


def test_a_candidates_fitness_is_that_of_the_pipeline_it_becomes(pipe, statistics, tmp_path):
    path = tmp_path / "search.json"
    best = search.search_group_sizes(pipe, CONFIG, CALLS, statistics=statistics, checkpoint=path, **SEARCH)
    values = json.loads(path.read_text())["values"].values()
    fitness = TrajectoryError(pipe, CALLS, num_inference_steps=3, seed=2)
    assert fitness(converted(pipe, best)[0]) == pytest.approx(min(values), rel=0.02)


def test_the_pipeline_given_is_left_alone(pipe, statistics):
    weights = copy.deepcopy(pipe.transformer.state_dict())
    pipe.scheduler.set_timesteps(9)
    before = final_latents(with_transformer(pipe, pipe.transformer), CALLS, num_inference_steps=3, seed=0)
    search.search_group_sizes(pipe, CONFIG, CALLS, **SEARCH)
    assert len(pipe.scheduler.timesteps) == 9
    assert all(torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items())
    after = final_latents(with_transformer(pipe, pipe.transformer), CALLS, num_inference_steps=3, seed=0)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_seed_gives_the_same_configuration_and_an_interrupted_search_resumes_to_it(
    pipe, statistics, found, tmp_path, monkeypatch
):
    run, left = TrajectoryError.__call__, [7]

    def interrupted(self, candidate):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return run(self, candidate)

    arguments = dict(statistics=statistics, checkpoint=tmp_path / "search.json", **SEARCH)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrajectoryError, "__call__", interrupted)
        search.search_group_sizes(pipe, CONFIG, CALLS, **arguments)
    assert len(json.loads((tmp_path / "search.json").read_text())["values"]) == 7
    assert search.search_group_sizes(pipe, CONFIG, CALLS, **arguments) == found
    with pytest.raises(ValueError, match="its limit is"):
        search.search_group_sizes(pipe, CONFIG, CALLS, **{**arguments, "limit": 4.5})
    with pytest.raises(ValueError, match="its calls is"):
        search.search_group_sizes(pipe, CONFIG, CALLS[:1], **arguments)


@pytest.mark.parametrize("bits", [4.4, 4.7])
def test_mean_bits_are_kept_in_the_file(pipe, statistics, bits):
    arguments = {**SEARCH, "limit": search.MeanBits(bits)}
    best = search.search_group_sizes(pipe, CONFIG, CALLS, statistics=statistics, **arguments)
    quantized, report = converted(pipe, best)
    layers = [quantized.transformer.get_submodule(row.name) for row in report.quantized]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(t.nbytes for m in layers for t in (m.weight, m.weight_scale, m.weight_zero_point) if t is not None)
    assert bits - 0.3 < 8 * stored / weights <= bits


def test_overrides_of_the_configuration_stay_and_are_not_searched(pipe, statistics):
    pinned = {"*.ff.net.2": {"weight_bits": 8}, "*.0.attn1.to_k": {"group_size": 128}}
    best = search.search_group_sizes(pipe, CONFIG.copy(overrides=pinned), CALLS, statistics=statistics, **SEARCH)
    names = [name for name in best.overrides if name not in pinned]
    assert list(best.overrides)[:2] == list(pinned)
    assert not any(name.endswith(("ff.net.2", "0.attn1.to_k")) for name in names)
    assert best.bits_of("transformer_blocks.0.ff.net.2").weight == 8
    assert best.recipe_of("transformer_blocks.0.attn1.to_k").group_size == 128


def test_it_combines_with_gptq(pipe, statistics):
    config = CONFIG.copy(rounding="gptq")
    best = search.search_group_sizes(pipe, config, CALLS, statistics=statistics, **SEARCH)
    fitness = TrajectoryError(pipe, CALLS, num_inference_steps=3, seed=2)
    with_gptq, nearest = (
        fitness(converted(pipe, best.copy(rounding=rounding), statistics=statistics)[0])
        for rounding in ("gptq", "nearest")
    )
    assert with_gptq < nearest


def test_any_function_of_a_pipeline_is_a_fitness(pipe, statistics):
    def coarse(candidate):
        """Best where groups are largest."""
        layers = [m for m in candidate.transformer.modules() if type(m) is QuantizedLinear]
        return -sum(layer.layout.group_size for layer in layers)

    best = search.search_group_sizes(pipe, CONFIG, CALLS, statistics=statistics, fitness=coarse, **SEARCH)
    assert max(sizes_of(best).values()) == 128 == min(sizes_of(best).values())


def test_a_model_without_a_spec_is_searched_too():
    pipe = tiny_pixart_pipeline()
    best = search.search_group_sizes(pipe, CONFIG, [PIXART_CALL], **SEARCH)
    sizes = sizes_of(best)
    assert any(".attn2." in name for name in sizes)
    assert {size for name, size in sizes.items() if "ff.net.2" not in name} == {32}  # the only divisor of width 32


def test_a_width_that_no_size_divides_keeps_one_scale_a_row():
    pipe = tiny_pipeline(num_attention_heads=1, attention_head_dim=24)  # widths 24 and 96
    best = search.search_group_sizes(pipe, CONFIG, CALLS, **{**SEARCH, "limit": search.BitOpsOf(32)})
    assert best.recipe_of("transformer_blocks.0.attn1.to_q").group_size == 0
    assert best.recipe_of("transformer_blocks.0.ff.net.2").group_size in (32, 96)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(limit=4.0), "the least is"),
        (dict(limit="bits"), "a budget is a number"),
        (dict(sizes=(128,)), "nothing to search"),
        (dict(sizes=(33, 100)), "nothing to search"),
        (dict(fitness="fid"), "fitness must be"),
        (dict(population=0), "population"),
        (dict(calls=[{**CALLS[0], "generator": torch.Generator()}]), "first candidate would use up"),
        (dict(start=[CONFIG.copy(weight_bits=8)]), "the search knows"),
    ],
)
def test_what_cannot_be_searched_is_refused(pipe, statistics, wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        search.search_group_sizes(pipe, CONFIG, **{"calls": CALLS, "statistics": statistics, **SEARCH, **wrong})


def test_a_quantized_pipeline_is_refused(pipe):
    with pytest.raises(ValueError, match="quantized already"):
        search.search_group_sizes(converted(pipe, CONFIG)[0], CONFIG, CALLS, **SEARCH)


@pytest.mark.slow
def test_on_a_trained_model_the_found_sizes_serve_other_seeds_better_than_uniform_ones():
    """At the bytes of 64 everywhere, by a seed and labels that the search never saw. Measured: 0.55 of the error."""
    pipe = DiTPipeline.from_pretrained(Path(__file__).parents[2] / "examples" / "dit-cifar10")
    pipe.set_progress_bar_config(disable=True)
    config = dq.DQConfig("qdit", 4, 8, group_size=64)
    seen, unseen = ([dict(class_labels=labels, guidance_scale=1.5)] for labels in ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9]))
    best = search.search_group_sizes(
        pipe,
        config,
        seen,
        num_inference_steps=10,
        limit=search.MeanBits(4 + 40 / 64),
        sizes=(32, 64, 128, 256, 512),
        population=12,
        parents=4,
        generations=2,
        progress=False,
    )
    fitness = TrajectoryError(pipe, unseen, num_inference_steps=10, seed=900)
    assert fitness(converted(pipe, best)[0]) < 0.8 * fitness(converted(pipe, config)[0])
