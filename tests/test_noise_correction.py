# SPDX-License-Identifier: Apache-2.0
"""PTQD's correction against its equations, and its scheduler against what a residual really adds to a step."""

import copy

import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CALLS, tiny_dit, tiny_pipeline

import diffusers_dq as dq
from diffusers_dq.denoise import TimestepArgument
from diffusers_dq.noise_correction import CorrectOutput, NoiseCorrection, PTQDScheduler, fit

SHAPES = {"picture": (2, 4, 6, 5), "video": (2, 4, 3, 6, 5), "tokens": (2, 20, 4)}
SLOPES = {900.0: 0.1, 500.0: -0.05, 20.0: 0.0}


def axis_of(shape) -> int:
    return 2 if len(shape) == 3 else 1


def by_channel(values: torch.Tensor, shape) -> torch.Tensor:
    """values [C] laid along the channels of that shape."""
    return values.view([-1 if i == axis_of(shape) else 1 for i in range(len(shape))])


def pairs(shape, noise: float = 0.0, seed: int = 0):
    """Predictions whose channels lie apart, and what an affine error, and noise, make of them; two for each step."""
    generator = torch.Generator().manual_seed(seed)
    offset = torch.tensor([0.0, 10.0, -3.0, 5.0], dtype=torch.float64)
    mean = torch.tensor([0.2, -0.1, 0.0, 0.4], dtype=torch.float64)
    found = []
    for t, slope in [*SLOPES.items()] * 2:
        exact = torch.randn(shape, dtype=torch.float64, generator=generator) + by_channel(offset, shape)
        residual = by_channel(mean, shape) + noise * torch.randn(shape, dtype=torch.float64, generator=generator)
        found.append((torch.full((shape[0],), t), exact, (1 + slope) * exact + residual))
    return found, mean


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_affine_error_is_fitted_and_taken_out(shape):
    """Exactly in fp64; the tables are fp32, and 2^-24 of slope and mean is left."""
    found, mean = pairs(shape)
    correction = fit(found, in_channels=4)
    assert correction.timesteps.tolist() == [20, 500, 900]
    assert torch.allclose(correction.slope, torch.tensor([SLOPES[t] for t in (20.0, 500.0, 900.0)]), atol=1e-7)
    assert torch.allclose(correction.mean, mean.float().expand(3, -1), atol=1e-6)
    assert correction.variance.max() < 1e-12
    for timestep, exact, quantized in found:
        assert torch.allclose(correction(quantized, timestep), exact, rtol=1e-6, atol=1e-6)


def test_slope_mean_and_variance_of_noisy_pairs():
    """Standard errors of 2 x 2 x 1024 values a channel: 0.1 / sqrt(4096) of the mean, and so on; five of them."""
    found, mean = pairs((2, 4, 32, 32), noise=0.1)
    correction = fit(found, in_channels=4)
    for t, slope, means, variances in zip(
        correction.timesteps.tolist(), correction.slope, correction.mean, correction.variance, strict=True
    ):
        assert abs(slope - SLOPES[t]) < 5 * 0.1 / (4 * 4096) ** 0.5
        # the mean is read off at exact = 0, 10 standard deviations from where the second channel lies
        assert (means - mean).abs().max() < 5 * 0.1 * (1 / 4096 + 100 / (4 * 4096)) ** 0.5
        assert (variances / 0.01 - 1).abs().max() < 5 * (2 / 4096) ** 0.5


@given(seed=st.integers(0, 99), noise=st.sampled_from([0.0, 0.3, 2.0]))
@settings(max_examples=15, deadline=None)
def test_what_is_left_has_no_mean_and_follows_the_prediction_no_more(seed, noise):
    """r - E[r] in each channel, and uncorrelated with the prediction: the normal equations, in fp64 but for tables."""
    found, _ = pairs(SHAPES["picture"], noise, seed)
    correction = fit(found, in_channels=4)
    for t in SLOPES:
        exact, left = (
            torch.cat([x for timestep, *both in found if timestep[0] == t for x in [get(timestep, *both)]])
            for get in (lambda ts, e, q: e, lambda ts, e, q: correction(q, ts) - e)
        )
        assert left.mean(dim=(0, 2, 3)).abs().max() < 1e-5
        centred = exact - exact.mean(dim=(0, 2, 3), keepdim=True)
        assert (centred * left).mean().abs() < 1e-5


def test_a_step_between_fitted_ones_takes_the_nearest_and_each_sample_its_own():
    found, _ = pairs(SHAPES["picture"])
    correction = fit(found, in_channels=4)
    x = torch.randn(2, 4, 6, 5)
    mixed = correction(x, torch.tensor([950.0, 120.0]))
    assert torch.equal(mixed[:1], correction(x[:1], torch.tensor([900])))
    assert torch.equal(mixed[1:], correction(x[1:], torch.tensor(20)))
    tokens = torch.tensor([[900.0, 0.0], [20.0, 0.0]])  # a timestep a token: the noisiest counts
    assert torch.equal(correction(x, tokens), correction(x, torch.tensor([900.0, 20.0])))


def test_a_learned_variance_is_left_alone():
    found, mean = pairs((2, 8, 6, 5)[:1] + (4, 6, 5))
    wide = [(t, *(torch.cat([x, torch.ones_like(x)], 1) for x in both)) for t, *both in found]
    correction = fit(wide, in_channels=4)
    assert correction.mean.shape == (3, 4)
    timestep, exact, quantized = wide[0]
    output = correction(quantized, timestep)
    assert torch.equal(output[:, 4:], quantized[:, 4:])
    assert torch.allclose(output[:, :4], exact[:, :4], atol=1e-5)


def test_without_pairs_it_says_what_to_do():
    with pytest.raises(ValueError, match="calibrate with samples=32"):
        fit([], 4)


def test_a_constant_prediction_has_no_slope_and_finite_tables():
    ones = torch.ones(2, 4, 3, 3)
    correction = fit([(torch.zeros(2), ones, ones + 0.5)], 4)
    assert correction.slope.tolist() == [0] and torch.allclose(correction.mean, torch.full((1, 4), 0.5))


def test_tables_follow_moves_and_no_casts():
    correction = fit(pairs(SHAPES["picture"])[0], 4)
    before = correction.mean.clone()
    correction.half()
    assert correction.mean.dtype == torch.float32 and torch.equal(correction.mean, before)
    assert correction(torch.randn(2, 4, 6, 5).bfloat16(), torch.tensor(900)).dtype == torch.bfloat16
    assert correction.to("meta").mean.is_meta


@pytest.mark.parametrize("kind", ["tuple", "dataclass"])
def test_outputs_of_either_kind_are_corrected(kind):
    model = tiny_dit()
    correction = fit(pairs((2, 4, 8, 8))[0], 4)
    model.add_module("noise_correction", correction)
    x, timestep = torch.randn(2, 4, 8, 8), torch.tensor([900, 20])
    output = (x, "rest") if kind == "tuple" else Transformer2DModelOutput(sample=x)
    hook = CorrectOutput(TimestepArgument.of(model))
    for args, kwargs in (((x, timestep), {}), ((x,), {"timestep": timestep})):
        corrected = hook(model, args, kwargs, copy.copy(output))
        sample = corrected[0] if kind == "tuple" else corrected.sample
        assert torch.equal(sample, correction(x, timestep))
        assert torch.equal(corrected[0], sample), "a dataclass is a tuple too"
        assert type(corrected) is type(output)
    if kind == "tuple":
        assert corrected[1:] == ("rest",)


# In a model


def quantized(folder, statistics, **config) -> DiTPipeline:
    pipe = DiTPipeline.from_pretrained(folder)
    settings = dict(method="rtn", weight_bits=4)
    dq.quantize(pipe, dq.DQConfig(**{**settings, **config}), statistics=statistics, progress=False)
    return pipe


@pytest.fixture(scope="module")
def corrected(dit_folder, dit_statistics) -> DiTPipeline:
    return quantized(dit_folder, dit_statistics, noise_correction=True)


@torch.no_grad()
def test_the_models_output_is_the_uncorrected_one_through_the_formula(corrected, dit_folder, dit_statistics, run_dit):
    plain = run_dit(quantized(dit_folder, dit_statistics).transformer)
    model, steps = corrected.transformer, (950, 500, 20)
    tables = model.noise_correction
    assert len(tables.timesteps) == 10
    for t, output, before in zip(steps, run_dit(model), plain, strict=True):
        i = (tables.timesteps - t).abs().argmin()
        expected = (before - tables.mean[i].view(1, 4, 1, 1)) / (1 + tables.slope[i])
        assert torch.equal(output, expected)
        assert not torch.equal(output, before)


@torch.no_grad()
def test_the_error_on_the_kept_inputs_has_no_mean_left(corrected, dit_folder, dit_statistics):
    """Of two samples a step, 128 values a channel; fp32 predictions of size 1."""
    full = DiTPipeline.from_pretrained(dit_folder).transformer
    errors = {}
    for sample in dit_statistics.samples:
        t = float(sample["timestep"].max())
        difference = corrected.transformer(**sample).sample - full(**sample).sample
        errors.setdefault(t, []).append(difference)
    assert len(errors) == 10
    for parts in errors.values():
        assert torch.cat(parts).mean(dim=(0, 2, 3)).abs().max() < 1e-5


@torch.no_grad()
def test_it_is_saved_and_loaded(corrected, run_dit, tmp_path):
    corrected.save_pretrained(tmp_path)
    reloaded = DiTPipeline.from_pretrained(tmp_path).transformer
    assert torch.equal(run_dit(reloaded), run_dit(corrected.transformer))
    assert isinstance(reloaded.noise_correction, NoiseCorrection)
    half = DiTPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).transformer
    assert torch.equal(half.noise_correction.slope, reloaded.noise_correction.slope)


@torch.no_grad()
def test_a_tuple_is_corrected_too(corrected):
    given = dict(hidden_states=torch.ones(1, 4, 8, 8), timestep=torch.tensor([500]), class_labels=torch.tensor([1]))
    model = corrected.transformer
    assert torch.equal(model(**given, return_dict=False)[0], model(**given).sample)


def test_a_dequantized_model_is_corrected_no_more(dit_folder, dit_statistics, run_dit):
    model = quantized(dit_folder, dit_statistics, noise_correction=True).transformer
    model.dequantize()
    assert not hasattr(model, "noise_correction") and not model._forward_hooks
    run_dit(model)


@torch.no_grad()
def test_a_model_that_learns_its_variance_is_corrected_in_the_noise_alone():
    pipe = tiny_pipeline(out_channels=8)
    statistics = dq.calibrate(pipe, CALLS, num_inference_steps=4, samples=4, progress=False)
    outputs = []
    given = dict(hidden_states=torch.ones(1, 4, 8, 8), timestep=torch.tensor([500]), class_labels=torch.tensor([1]))
    for corrects in (False, True):
        pipe = tiny_pipeline(out_channels=8)
        config = dq.DQConfig("rtn", weight_bits=4, noise_correction=corrects)
        dq.quantize(pipe, config, statistics=statistics, progress=False)
        outputs.append(pipe.transformer(**given).sample)
    assert torch.equal(outputs[0][:, 4:], outputs[1][:, 4:])
    assert not torch.equal(outputs[0][:, :4], outputs[1][:, :4])


def test_without_kept_inputs_the_model_stays_as_it_was(dit_folder):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    statistics = dq.calibrate(pipe, CALLS, num_inference_steps=2, samples=0, progress=False)
    with pytest.raises(ValueError, match="calibrate with samples=32"):
        dq.quantize(pipe, dq.DQConfig("ptqd"), statistics=statistics, progress=False)
    assert type(pipe.transformer.transformer_blocks[0].attn1.to_q) is torch.nn.Linear


# The scheduler


def followed(variance: float, slope: float = 0.0, **config) -> PTQDScheduler:
    model = tiny_dit()
    correction = NoiseCorrection(2, 4)
    correction.timesteps.copy_(torch.tensor([0.0, 1000.0]))
    correction.variance.fill_(variance)
    correction.slope.fill_(slope)
    model.add_module("noise_correction", correction)
    return PTQDScheduler(**config).follow(model)


def stepped(scheduler: DDPMScheduler, t: int, noise: torch.Tensor, seed: int = 0) -> torch.Tensor:
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    return scheduler.step(noise, t, sample, generator=generator).prev_sample


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [None, 10])
def test_without_residual_variance_it_is_ddpm(kind, steps):
    plain, ours = DDPMScheduler(variance_type=kind), followed(0.0, variance_type=kind)
    for scheduler in (plain, ours):
        if steps:
            scheduler.set_timesteps(steps)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in plain.timesteps.tolist()[:: 1 if steps else 111]:
        assert torch.equal(stepped(ours, t, noise), stepped(plain, t, noise))


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [20, 1000])
def test_it_adds_less_noise_by_what_the_residual_brings(kind, steps):
    """How far a step moves with the prediction is read off the scheduler's own steps, so that
    Var[x_{t-1}] = variance + (dx / deps)^2 Var[r] / (1 + k)^2 stays what it was. fp64, but alphas of fp32."""
    variance, slope = 1e-3, 0.25
    settings = dict(variance_type=kind, clip_sample=False)
    plain, ours = DDPMScheduler(**settings), followed(variance, slope, **settings)
    for scheduler in (plain, ours):
        scheduler.set_timesteps(steps)
    taken_all = 0
    for t in plain.timesteps.tolist()[: -1 : max(1, steps // 20)]:
        zeros, ones = torch.zeros(1, 4, 8, 8, dtype=torch.float64), torch.ones(1, 4, 8, 8, dtype=torch.float64)
        moved = (stepped(plain, t, ones) - stepped(plain, t, zeros)).double().mean()
        brought = moved.square() * variance / (1 + slope) ** 2
        before = plain._get_variance(t)
        expected = (before - brought).clamp(min=0)
        assert ours._get_variance(t) == pytest.approx(float(expected), rel=1e-4, abs=1e-4 * float(brought))
        taken_all += expected == 0
    assert 0 < brought < before, "in the last steps something is taken and something left"


def test_more_than_there_is_cannot_be_taken():
    scheduler = followed(1e6)
    assert 0 <= scheduler._get_variance(500) <= 1e-20


@pytest.mark.parametrize("kind", ["learned", "learned_range", "fixed_small_log", "fixed_large_log"])
def test_other_variances_are_refused(kind):
    with pytest.raises(ValueError, match=f"variance_type is {kind!r}"):
        followed(0.1, variance_type=kind)._get_variance(500, predicted_variance=torch.ones(1))


def test_other_predictions_are_refused():
    with pytest.raises(ValueError, match="prediction_type is 'v_prediction'"):
        followed(0.1, prediction_type="v_prediction")


def test_models_without_a_correction_are_refused():
    with pytest.raises(ValueError, match='DiTTransformer2DModel has no noise correction: .*method="ptqd"'):
        PTQDScheduler().follow(tiny_dit())


def test_it_stands_in_a_pipeline(corrected):
    pipe = copy.copy(corrected)
    pipe.scheduler = PTQDScheduler.from_config(corrected.scheduler.config).follow(corrected.transformer)
    call = dict(num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0))
    assert pipe(class_labels=[1], **call).images.shape == (1, 8, 8, 3)


def test_a_pipeline_with_it_is_saved_and_loaded(corrected, tmp_path):
    """It has to follow the loaded transformer again."""
    pipe = copy.copy(corrected)
    pipe.register_modules(scheduler=PTQDScheduler.from_config(corrected.scheduler.config))
    pipe.save_pretrained(tmp_path)
    reloaded = DiTPipeline.from_pretrained(tmp_path)
    assert type(reloaded.scheduler) is PTQDScheduler
    assert reloaded.scheduler.follow(reloaded.transformer) is reloaded.scheduler
