# SPDX-License-Identifier: Apache-2.0
"""Activation bits by step: of the schedule that was calibrated, in config.json, and in a model's output."""

import json
import logging

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.pipelines.cosmos.mixed_precision import (
    FIRST_LAST_N_FP8_POLICY,
    Cosmos3MixedPrecisionConfig,
    parse_diffusion_step_policy,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CALLS, assert_close, tiny_dit

import diffusers_dq as dq
from diffusers_dq.denoise import TimestepArgument
from diffusers_dq.installation import GROUPS, SelectGroup
from diffusers_dq.step_policy import POLICY, StepBits, from_runtime, to_runtime
from diffusers_dq.timesteps import TimestepGroups

BITS = st.sampled_from([4, 6, 8, 16])

# Of a schedule


@st.composite
def schedules(draw):
    """(timesteps in the order of denoising, falling or rising; guard; ranges)"""
    values = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=40, unique=True))
    timesteps = torch.tensor(sorted(values, reverse=draw(st.booleans())), dtype=torch.float32)
    first = draw(st.integers(0, len(values)))
    last = draw(st.integers(0, len(values) - first))
    return timesteps, (first, last), draw(st.none() | st.lists(BITS, min_size=1, max_size=len(values)))


@given(schedule=schedules())
@settings(max_examples=50, deadline=None)
def test_each_calibrated_step_has_the_bits_that_counting_gives_it(schedule):
    timesteps, (first, last), ranges = schedule
    steps = len(timesteps)
    policy = StepBits.of_schedule(timesteps, (first, last), ranges)
    expected = []
    for i in range(steps):  # step i is in part r of n where r / n <= i / S < (r + 1) / n
        part = None if ranges is None else next(b for r, b in enumerate(ranges) if i * len(ranges) < (r + 1) * steps)
        expected.append(16 if i < first or steps - i <= last else part)
    if policy is None:
        assert set(expected) == {None}
        return
    found = [policy.at(t) for t in timesteps.tolist()]
    assert found == expected
    assert len(policy.boundaries) == sum(a != b for a, b in zip(found, found[1:], strict=False))
    assert StepBits.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


@given(steps=st.integers(1, 60), parts=st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_parts_of_a_schedule_differ_by_at_most_a_step(steps, parts):
    ranges = list(range(parts))
    if parts > steps:
        with pytest.raises(ValueError, match=f"has {parts} parts, and only {steps} steps"):
            StepBits.of_schedule(torch.arange(steps).float(), (0, 0), ranges)
        return
    policy = StepBits.of_schedule(torch.arange(steps).flip(0).float(), (0, 0), ranges)
    counts = [0] * parts
    for t in range(steps):
        counts[policy.at(t)] += 1
    assert max(counts) - min(counts) <= 1
    assert [policy.at(t) for t in reversed(range(steps))] == sorted(policy.at(t) for t in range(steps))


def test_between_steps_the_nearer_one_decides_and_outside_the_last():
    policy = StepBits.of_schedule(torch.tensor([900.0, 500.0, 100.0]), (1, 0), None)
    assert policy == StepBits((700.0,), (None, 16))
    assert [policy.at(t) for t in (0, 100, 699, 700, 701, 999)] == [None, None, None, None, 16, 16]


def test_rising_timesteps_are_guarded_where_denoising_begins():
    policy = StepBits.of_schedule(torch.tensor([0.0, 0.25, 0.5, 0.75]), (1, 0), [8, 4])
    assert [policy.at(t) for t in (0.0, 0.25, 0.5, 0.75)] == [16, 8, 4, 4]


def test_a_policy_without_a_difference_is_none():
    assert StepBits.of_schedule(torch.arange(4.0), (0, 0), None) is None


@pytest.mark.parametrize("guard", [(3, 2), (5, 0), (0, 5)])
def test_more_guard_steps_than_steps_are_refused(guard):
    with pytest.raises(ValueError, match="more than the 4 calibrated steps|only 4 steps were calibrated"):
        StepBits.of_schedule(torch.arange(4.0), guard, None)


@pytest.mark.parametrize(
    "content",
    [
        dict(boundaries=[], bits=[8, 4]),
        dict(boundaries=[5, 1], bits=[8, 4, 8]),
        dict(boundaries=[1, 1], bits=[8, 4, 8]),
    ],
)
def test_boundaries_that_do_not_go_with_bits_are_refused(content):
    with pytest.raises(ValueError, match="do not go with the boundaries"):
        StepBits.from_dict(content)


@pytest.mark.parametrize("descending", [True, False])
def test_the_noisiest_of_a_batch_decides(descending):
    model = tiny_dit()
    model.add_module(GROUPS, TimestepGroups())
    hook = SelectGroup(TimestepArgument.of(model), descending, StepBits((500.0,), (4, 16)))
    for timestep in (torch.tensor([900.0, 100.0]), [900.0, 100.0]):
        hook(model, (None, timestep), {})
        assert model.timestep_groups.activation_bits == (16 if descending else 4)
    hook(model, (), {"timestep": 501})
    assert model.timestep_groups.activation_bits == 16


# diffusers' words


@given(first=st.integers(0, 9), last=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_the_runtime_dict_is_read_back_and_by_diffusers(first, last):
    runtime = json.loads(json.dumps(to_runtime((first, last))))
    assert from_runtime(runtime) == (first, last)
    parsed = parse_diffusion_step_policy(runtime[POLICY])
    assert (parsed.first_steps, parsed.last_steps, parsed.overlap) == (first, last, "a16")


@given(steps=st.integers(2, 30), first=st.integers(0, 15), last=st.integers(0, 15))
@settings(max_examples=50, deadline=None)
def test_steps_guarded_are_those_that_diffusers_would_guard(steps, first, last):
    if first + last > steps:
        return
    timesteps = torch.linspace(999, 0, steps)
    policy = StepBits.of_schedule(timesteps, (first, last), None) or StepBits((), (None,))
    theirs = Cosmos3MixedPrecisionConfig(format="fp8", first_steps=first, last_steps=last)
    for i, t in enumerate(timesteps.tolist()):
        assert (policy.at(t) == 16) == theirs.use_high_precision(i, steps)


def test_diffusers_own_policy_is_accepted():
    assert from_runtime({POLICY: FIRST_LAST_N_FP8_POLICY}) == (3, 3)
    native = {**FIRST_LAST_N_FP8_POLICY, "first_steps": {"count": 5, "mode": "native"}}
    assert from_runtime({POLICY: native}) == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(schema_version=2), "schema_version': 2"),
        (dict(type="ranges"), "'type': 'ranges'"),
        (dict(index_space="timestep"), "index_space"),
        (dict(scope=["vae"]), "scope"),
        (dict(default_mode="a16"), "default_mode"),
        (dict(first_steps=None), "first_steps must be"),
        (dict(first_steps={"count": 1, "mode": "a8"}), "first_steps must be"),
        (dict(last_steps={"count": -1, "mode": "a16"}), "last_steps.count must be a whole number, got -1"),
        (dict(last_steps={"count": True, "mode": "a16"}), "last_steps.count"),
        (dict(last_steps={"mode": "a16"}), "last_steps.count"),
    ],
)
def test_policies_of_another_kind_are_refused(change, message):
    policy = {**to_runtime((1, 1))[POLICY], **change}
    with pytest.raises(ValueError, match=message):
        from_runtime({POLICY: policy})
    with pytest.raises(ValueError, match=message):
        dq.DQConfig("rtn", runtime={POLICY: policy})


@pytest.mark.parametrize("runtime", [{}, {POLICY: None}, {POLICY: to_runtime((1, 1))[POLICY], "more": 1}])
def test_a_runtime_with_something_else_is_refused(runtime):
    with pytest.raises(ValueError, match="runtime must be"):
        from_runtime(runtime)


# The configuration


def test_a_config_goes_through_json(tmp_path):
    config = dq.DQConfig("rtn", guard_steps=(2, 3), step_bits=[8, 4])
    config.to_json_file(tmp_path / "config.json")
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["runtime"] == to_runtime((2, 3))
    assert dq.DQConfig.from_json_file(tmp_path / "config.json") == config
    del content["guard_steps"]
    assert dq.DQConfig(**content) == config, "diffusers' words alone say as much"
    assert "runtime" not in dq.DQConfig("rtn").to_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(guard_steps=(1,)), "two whole numbers"),
        (dict(guard_steps=(1, -1)), "two whole numbers"),
        (dict(guard_steps=(1, 2), runtime=to_runtime((2, 2))), "give one of them"),
        (dict(guard_steps=(1, 1), activation_bits=16), "which is 16"),
        (dict(step_bits=[8, 4], activation_bits=16), "which is 16"),
        (dict(step_bits=[8, 3]), "activation_bits must be one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dq.DQConfig("rtn", **settings)


# In a model


def quantized(folder, statistics, **config):
    pipe = DiTPipeline.from_pretrained(folder)
    dq.quantize(pipe, dq.DQConfig(**config), statistics=statistics, progress=False)
    return pipe.transformer


METHODS = {
    "dynamic": dict(method="rtn", weight_bits=4),
    "static, by timestep group, folded": dict(method="htg", groups=3, ranges="group", output_correction=False),
    "static, gptq, groups": dict(method="g4w_p4a", weight_bits=4),
    "dynamic groups with zero points": dict(method="qdit", weight_bits=4, group_size=32),
    "rotated": dict(method="quarot"),
    "branch": dict(method="svdquant", low_rank=4, alpha=0.5),
    "conditioning rounded too": dict(method="tfmq", rounding="nearest"),
}


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@torch.no_grad()
def test_guard_steps_are_weight_only_and_the_others_as_without(config, dit_folder, dit_statistics, run_dit, tmp_path):
    guarded = quantized(dit_folder, dit_statistics, **config, guard_steps=(2, 3))
    weight_only = quantized(dit_folder, dit_statistics, **config, activation_bits=16)
    rounded = quantized(dit_folder, dit_statistics, **config)
    steps = tuple(dit_statistics.timesteps.int().tolist())
    outputs = [run_dit(model, steps) for model in (guarded, weight_only, rounded)]
    for i, (output, unrounded, as_always) in enumerate(zip(*outputs, strict=True)):
        inside = i < 2 or i >= len(steps) - 3
        assert torch.equal(output, unrounded if inside else as_always), f"step {i}"
        assert not torch.equal(unrounded, as_always)
    guarded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["runtime"] == to_runtime((2, 3))
    reloaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run_dit(reloaded, steps), outputs[0])


@pytest.mark.parametrize(
    "config", [METHODS["dynamic"], METHODS["dynamic groups with zero points"], METHODS["branch"]], ids=str
)
@torch.no_grad()
def test_each_part_of_the_schedule_has_its_bits(config, dit_folder, dit_statistics, run_dit, tmp_path):
    parts = [8, 4, 6, 16, 5]
    model = quantized(dit_folder, dit_statistics, **config, step_bits=parts)
    model.save_pretrained(tmp_path)
    reloaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    uniform = {bits: quantized(dit_folder, dit_statistics, **config, activation_bits=bits) for bits in parts}
    for i, t in enumerate(dit_statistics.timesteps.int().tolist()):
        expected = run_dit(uniform[parts[i // 2]], (t,))
        assert torch.equal(run_dit(model, (t,)), expected), f"step {i}"
        assert torch.equal(run_dit(reloaded, (t,)), expected)


@torch.no_grad()
def test_compiled_blocks_follow_the_steps(dit_folder, dit_statistics):
    """By block: the number of bits is chosen in a hook of the whole model, which waits for the timestep's value."""
    model = quantized(dit_folder, dit_statistics, method="rtn", step_bits=[16, 4])
    x, labels = torch.randn(1, 4, 8, 8), torch.tensor([1])

    def output(t: int) -> torch.Tensor:
        return model(x, timestep=torch.tensor([t]), class_labels=labels).sample

    steps = (901, 101, 901)
    expected = [output(t) for t in steps]
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for t, before in zip(steps, expected, strict=True):
        assert_close(output(t), before)


@pytest.mark.parametrize("config", [dict(method="htg", groups=2), dict(method="rtn", dynamic=False)], ids=str)
def test_static_ranges_are_for_one_number_of_bits(config, dit_folder, dit_statistics):
    with pytest.raises(ValueError, match="static range of transformer_blocks.0.* is for 8 bits; use 16"):
        quantized(dit_folder, dit_statistics, **config, step_bits=[8, 4])
    quantized(dit_folder, dit_statistics, **config, step_bits=[16, 8])


def test_without_statistics_it_says_so_or_prepares(dit_folder, dit_statistics, run_dit, caplog):
    config = dq.DQConfig("rtn", guard_steps=(1, 1))
    pipe = DiTPipeline.from_pretrained(dit_folder)
    with pytest.raises(ValueError, match="needs statistics: calibrate first"):
        dq.quantize(pipe, config, progress=False)
    with caplog.at_level(logging.WARNING, "diffusers_dq"):
        model = DiTTransformer2DModel.from_pretrained(dit_folder / "transformer", quantization_config=config)
    assert "prepared for method 'rtn'" in caplog.text
    pipe.transformer = model
    dq.calibrate(pipe, CALLS, num_inference_steps=10, progress=False)
    dq.quantize(pipe, progress=False)
    expected = quantized(dit_folder, dit_statistics, method="rtn", guard_steps=(1, 1))
    assert torch.equal(run_dit(pipe.transformer), run_dit(expected))


def test_too_many_guard_steps_for_the_calibrated_schedule(dit_folder, dit_statistics):
    with pytest.raises(ValueError, match="more than the 10 calibrated steps"):
        quantized(dit_folder, dit_statistics, method="rtn", guard_steps=(6, 5))


# Found wrong, in files that this session may not mend


@torch.no_grad()
def test_an_input_that_lives_over_steps_is_rounded_anew_for_other_bits(dit_folder, dit_statistics):
    """Text embeddings are one tensor for all steps, read by key and value."""
    model = quantized(dit_folder, dit_statistics, method="rtn", step_bits=[8, 4])
    attention, x = model.transformer_blocks[0].attn1, torch.randn(1, 5, 32)
    sizes = []
    for bits in (8, 4):
        model.timestep_groups.activation_bits = bits
        sizes.append(int(attention.to_k.rounded(x).integers.abs().max()))
    assert sizes == [127, 7]


def test_static_ranges_of_overridden_layers_are_for_their_own_bits(dit_folder, dit_statistics):
    overrides = {"*.to_q": {"activation_bits": 6}}
    with pytest.raises(ValueError, match="is for 6 bits"):
        quantized(dit_folder, dit_statistics, method="rtn", dynamic=False, overrides=overrides, step_bits=[16, 8])


@torch.no_grad()
def test_attention_is_not_rounded_in_guard_steps(dit_folder, dit_statistics, run_dit):
    model = quantized(dit_folder, dit_statistics, method="rtn", guard_steps=(2, 0), quantize_attention=True)
    weight_only = quantized(dit_folder, dit_statistics, method="rtn", activation_bits=16)
    steps = tuple(dit_statistics.timesteps.int().tolist()[:2])
    assert torch.allclose(run_dit(model, steps), run_dit(weight_only, steps), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_noise_is_corrected_by_what_each_step_is_rounded_to(dit_folder, dit_statistics):
    settings = dict(method="rtn", weight_bits=8, noise_correction=True)
    both = quantized(dit_folder, dit_statistics, **settings, step_bits=[16, 4]).noise_correction
    upper, lower = (
        quantized(dit_folder, dit_statistics, **settings, activation_bits=bits).noise_correction for bits in (16, 4)
    )
    assert torch.equal(both.slope[5:], upper.slope[5:])  # by rising timestep
    assert torch.equal(both.slope[:5], lower.slope[:5])
