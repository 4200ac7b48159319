# SPDX-License-Identifier: Apache-2.0
import copy
import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline
from support import CALLS, PIXART_CALL, tiny_pipeline, tiny_pixart_pipeline

import diffusers_dq as dq
from diffusers_dq import search
from diffusers_dq.allocation import cost_of
from diffusers_dq.costs import Choice
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.search.record import Record
from diffusers_dq.search.running import with_transformer
from diffusers_dq.search.sensitivity import from_outputs, from_statistics
from diffusers_dq.search.trial import Trial, layers_of

CONFIG = dq.DQConfig("rtn", 4, 8)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(num_attention_heads=4)


@pytest.fixture(scope="module")
def statistics(pipe):
    return dq.calibrate(pipe, CALLS, num_inference_steps=5, samples=4, progress=False)


@pytest.fixture(scope="module")
def trial(pipe, statistics):
    names = [layer.name for layer in layers_of(pipe.transformer, CONFIG, statistics)]
    return Trial(pipe.transformer, CONFIG, statistics, {name: [Choice(4, 8), Choice(8, 8)] for name in names})


def stored_bytes(model):
    """In the file, of integer weights, scales and zero points; number of weights."""
    layers = [module for module in model.modules() if type(module) is QuantizedLinear]
    stored = [t for m in layers for t in (m.weight, m.weight_scale, m.weight_zero_point) if t is not None]
    packed = sum(m.weight.nbytes // 4 for m in layers if m.layout.weight_bits == 6)  # four in three bytes of a file
    return sum(t.nbytes for t in stored) - packed, sum(m.in_features * m.out_features for m in layers)


def test_an_output_sensitivity_is_the_error_with_that_linear_alone_converted(pipe, statistics, trial):
    found = from_outputs(trial, trial.choices, statistics)
    assert all(error[0] > error[1] > 0 for error in found.output.values())
    name = "transformer_blocks.1.attn1.to_v"
    others = {n: dict(weight_bits=16, activation_bits=16) for n in trial.choices if n != name}
    model = copy.deepcopy(pipe.transformer)
    dq.quantize(model, CONFIG.copy(overrides=others), progress=False)
    errors = []
    for sample in statistics.samples:
        with torch.no_grad():
            x, y = (m(**{**sample, "return_dict": False})[0].double() for m in (pipe.transformer, model))
        errors.append(float((x - y).square().mean()))
    assert found.output[name][0] == pytest.approx(sum(errors) / len(errors), rel=1e-3)


def test_sensitivity_without_running_needs_no_samples_and_ranks_bits(statistics, trial):
    table = from_statistics(trial, trial.choices, replace(statistics, samples=()))
    assert table.keys() == trial.choices.keys()
    assert all(1 > four > 4 * eight > 0 for four, eight in table.values())
    with pytest.raises(ValueError, match="calibrate with samples"):
        from_outputs(trial, trial.choices, replace(statistics, samples=()))


def test_layers_are_measured_by_the_metric_of_their_kind():
    pipe = tiny_pixart_pipeline()
    statistics = dq.calibrate(pipe, [PIXART_CALL], num_inference_steps=3, samples=2, progress=False)
    names = [layer.name for layer in layers_of(pipe.transformer, CONFIG, statistics)]
    trial = Trial(pipe.transformer, CONFIG, statistics, {name: [Choice(4, 8)] for name in names})
    found = from_outputs(trial, trial.choices, statistics)
    assert {name for name, group in found.groups.items() if group == "text alignment"} == {
        name for name in names if ".attn2." in name
    }
    for name, group in found.groups.items():
        assert (found.own[name] == found.output[name]) == (group == "visual quality")


def test_metrics_of_pictures_are_differences_to_full_precision_and_resume(pipe, statistics, trial, tmp_path):
    runs = []

    def metric(candidate):
        runs.append(sum(type(m) is QuantizedLinear for m in candidate.transformer.modules()))
        return 10.0 + 5 * runs[-1]

    metrics = [search.LayerMetric("score", ("*",), metric, on="pipeline")]
    some = {name: trial.choices[name] for name in list(trial.choices)[:2]}
    path = tmp_path / "table.json"
    found = from_outputs(trial, some, statistics, metrics, pipe=pipe, record=Record(path, {}))
    assert runs == [0, 1, 1, 1, 1] and all(row == [5, 5] for row in found.own.values())
    content = json.loads(path.read_text())
    del content["values"][list(content["values"])[-1]]
    path.write_text(json.dumps(content))
    assert from_outputs(trial, some, statistics, metrics, pipe=pipe, record=Record(path, {})) == found
    assert len(runs) == 6
    with pytest.raises(ValueError, match="'score' is of pictures"):
        from_outputs(trial, some, statistics, metrics)


@pytest.mark.parametrize(("metrics", "mode"), [("outputs", "joint"), ("outputs", "decoupled"), ("layers", "joint")])
@pytest.mark.parametrize("bits", [4.9, 6.0])
def test_a_budget_of_mean_bits_is_kept_in_the_file_and_used(pipe, statistics, metrics, mode, bits):
    config = dq.allocate_bits(pipe, CONFIG, statistics, budget=bits, metrics=metrics, mode=mode, progress=False)
    model = copy.deepcopy(pipe.transformer)
    dq.quantize(model, config, progress=False)
    nbytes, weights = stored_bytes(model)
    assert bits - 0.3 < 8 * nbytes / weights <= bits


@pytest.mark.parametrize("budget", [search.StoredBytes(100_000), search.ShareOfBF16(0.34)])
def test_budgets_of_bytes_and_shares_are_kept(pipe, statistics, budget):
    config = dq.allocate_bits(pipe, CONFIG, statistics, budget=budget, metrics="layers", progress=False)
    model = copy.deepcopy(pipe.transformer)
    dq.quantize(model, config, progress=False)
    nbytes, weights = stored_bytes(model)
    most = 100_000 if isinstance(budget, search.StoredBytes) else 0.34 * 2 * weights
    assert 0.9 * most < nbytes <= most


def test_the_allocation_is_the_best_by_its_own_table(pipe, statistics, trial):
    config = dq.allocate_bits(pipe, CONFIG, statistics, budget=6.0, metrics="layers", progress=False)
    table = from_statistics(trial, trial.choices, statistics)
    errors = list(table.values())
    costs = [[trial.stored_bits(name, choice) for choice in some] for name, some in trial.choices.items()]
    chosen = [[4, 8].index(config.bits_of(name).weight) for name in table]
    spent, found = cost_of(chosen, costs), cost_of(chosen, errors)
    random = torch.Generator().manual_seed(0)
    for _ in range(3000):
        other = torch.randint(0, 2, (len(errors),), generator=random).tolist()
        assert cost_of(other, costs) > spent or cost_of(other, errors) >= found - 1e-9


def test_bits_of_inputs_are_chosen_with_those_of_weights(pipe, statistics):
    pairs = ((4, 6), (4, 8), (8, 8))
    config = dq.allocate_bits(pipe, CONFIG, statistics, budget=6.0, bits=pairs, metrics="layers", progress=False)
    taken = {(o["weight_bits"], o["activation_bits"]) for o in config.overrides.values()}
    assert taken <= set(pairs)
    of_blocks = {(o["weight_bits"], o["activation_bits"]) for n, o in config.overrides.items() if "norm1" not in n}
    assert (4, 6) not in of_blocks  # 8 bits of an input cost no storage


def test_the_model_is_left_alone_and_the_result_survives_a_file(pipe, statistics, tmp_path, run_dit):
    before = run_dit(pipe.transformer)
    config = dq.allocate_bits(pipe.transformer, CONFIG, statistics, budget=6.0, progress=False)
    assert torch.equal(run_dit(pipe.transformer), before)
    config.to_json_file(tmp_path / "found.json")
    assert dq.DQConfig.from_json_file(tmp_path / "found.json") == config
    private = with_transformer(pipe, copy.deepcopy(pipe.transformer))
    dq.quantize(private, tmp_path / "found.json", progress=False)
    expected = run_dit(private.transformer)
    private.save_pretrained(tmp_path / "pipe")
    assert torch.equal(run_dit(DiTPipeline.from_pretrained(tmp_path / "pipe").transformer), expected)


def test_one_table_serves_several_budgets_and_no_other_configuration(pipe, statistics, tmp_path, monkeypatch):
    arguments = dict(checkpoint=tmp_path / "table.json", progress=False)
    dq.allocate_bits(pipe, CONFIG, statistics, budget=5.0, **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(Trial, "using", lambda *_: pytest.fail("measured again"))
        dq.allocate_bits(pipe, CONFIG, statistics, budget=7.0, **arguments)
    with pytest.raises(ValueError, match="its config is"):
        dq.allocate_bits(pipe, CONFIG.copy(method="quarot"), statistics, budget=7.0, **arguments)


def test_pinned_layers_keep_their_bits_and_count(pipe, statistics):
    config = CONFIG.copy(overrides={"*.ff.*": {"weight_bits": 8}})
    found = dq.allocate_bits(pipe, config, statistics, budget=6.5, metrics="layers", progress=False)
    assert not any(".ff." in name for name in found.overrides if name != "*.ff.*")
    model = copy.deepcopy(pipe.transformer)
    dq.quantize(model, found, progress=False)
    nbytes, weights = stored_bytes(model)
    assert 8 * nbytes / weights <= 6.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(budget=4.0), "cannot be met: with the fewest bits"),
        (dict(budget=0), "above zero"),
        (dict(budget="small"), "a budget is a number"),
        (dict(bits=()), "bits is empty"),
        (dict(bits=(5,)), "weight_bits must be one of"),
        (dict(mode="greedy"), "'joint' or 'decoupled'"),
        (dict(metrics="clip"), "metrics must be"),
        (dict(metrics="layers", mode="decoupled"), "one metric for all layers, which nothing can decouple"),
        (dict(metrics=[search.LayerMetric("text", ("*attn2*",), search.guidance_error)]), "no metric is for"),
    ],
)
def test_what_cannot_be_allocated_is_refused(pipe, statistics, wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        dq.allocate_bits(pipe, CONFIG, statistics, **{"budget": 6.0, "progress": False, **wrong})


def test_a_quantized_model_is_refused(pipe, statistics):
    model = copy.deepcopy(pipe.transformer)
    dq.quantize(model, CONFIG, progress=False)
    with pytest.raises(ValueError, match="quantized already"):
        dq.allocate_bits(model, CONFIG, statistics, budget=6.0)


def test_evolved_bits_start_from_an_allocation_and_end_no_worse(pipe, statistics, tmp_path):
    run = dict(num_inference_steps=3, seed=2)
    start = dq.allocate_bits(pipe, CONFIG, statistics, budget=6.5, bits=(4, 6, 8), progress=False)
    path = tmp_path / "search.json"
    found = dq.search_bits(
        pipe,
        CONFIG,
        CALLS,
        budget=6.5,
        bits=(4, 6, 8),
        statistics=statistics,
        start=[start],
        population=8,
        parents=3,
        generations=4,
        checkpoint=path,
        progress=False,
        **run,
    )
    values = list(json.loads(path.read_text())["values"].values())
    assert min(values) < values[0]  # the first candidate is `start`
    fitness = search.TrajectoryError(pipe, CALLS, **run)
    errors = []
    for config in (start, found):
        private = with_transformer(pipe, copy.deepcopy(pipe.transformer))
        dq.quantize(private, config, progress=False)
        errors.append(fitness(private))
    assert errors == pytest.approx([values[0], min(values)], rel=0.02)
    nbytes, weights = stored_bytes(private.transformer)
    assert 8 * nbytes / weights <= 6.5


def test_a_cost_of_the_users_is_a_budget(pipe, statistics):
    def milliseconds(name, choice):
        return 2.0 if choice.weight_bits == 8 else 1.0

    budget = search.LayerCost(milliseconds, 18.0, "ms")
    config = dq.allocate_bits(pipe, CONFIG, statistics, budget=budget, metrics="layers", progress=False)
    assert sorted(config.bits_of(name).weight for name in config.overrides) == [4] * 10 + [8] * 4
    run = dict(num_inference_steps=2, population=4, generations=1, progress=False)
    found = dq.search_bits(pipe, CONFIG, CALLS, budget=budget, statistics=statistics, **run)
    assert sum(found.bits_of(name).weight == 8 for name in found.overrides) <= 4
    with pytest.raises(ValueError, match="the cost is 14 ms"):
        impossible = search.LayerCost(milliseconds, 13.0, "ms")
        dq.allocate_bits(pipe, CONFIG, statistics, budget=impossible, progress=False)
