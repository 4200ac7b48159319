# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from diffusers import DDIMScheduler
from support import CALLS, tiny_dit, tiny_pipeline
from torch import nn

import diffusers_dq as dq
from diffusers_dq.calibration import _Recorder
from diffusers_dq.denoise import TimestepArgument, denoiser, watching_timestep

STEPS = 5


def calibrate(pipe=None, calls=CALLS, **arguments):
    return dq.calibrate(pipe or tiny_pipeline(), calls, num_inference_steps=STEPS, progress=False, **arguments)


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def assert_same(first: dq.Statistics, second: dq.Statistics) -> None:
    assert torch.equal(first.timesteps, second.timesteps)
    assert first.sites.keys() == second.sites.keys()
    for name, site in first.sites.items():
        assert site.linears == second.sites[name].linears
        for key, value in site.tensors().items():
            assert torch.equal(value, second.sites[name].tensors()[key]), (name, key)


def test_extremes_are_those_of_everything_the_linear_received():
    pipe = tiny_pipeline()
    name = "transformer_blocks.1.ff.net.2"
    received: dict[float, list[torch.Tensor]] = {}
    now = []
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: now.append(float(k["timestep"][0])), with_kwargs=True)
    pipe.transformer.get_submodule(name).register_forward_pre_hook(
        lambda m, a: received.setdefault(now[-1], []).append(a[0].flatten(0, 1))
    )
    statistics = calibrate(pipe)
    site = statistics.sites[name]
    assert statistics.timesteps.tolist() == list(received), "in the order of denoising"
    assert statistics.descending
    for step, parts in enumerate(received.values()):
        x = torch.cat(parts)
        assert len(parts) == len(CALLS)
        assert torch.equal(site.minimum[step], x.amin(0))
        assert torch.equal(site.maximum[step], x.amax(0))
        rows = x.bfloat16()
        for token in site.tokens[step]:
            assert (rows == token).all(1).any(), "a sampled token is one that was received"


def test_linears_of_a_group_share_one_site_and_attention_operands_have_their_own():
    sites = calibrate().sites
    block = "transformer_blocks.0.attn1"
    assert sites[f"{block}.to_q"].linears == (f"{block}.to_q", f"{block}.to_k", f"{block}.to_v")
    assert f"{block}.to_k" not in sites
    assert {f"{block}.to_{letter}:output" for letter in "qkv"} <= sites.keys()


def test_a_seed_gives_the_same_statistics_again_and_another_seed_others():
    first = calibrate(seed=3)
    assert_same(first, calibrate(seed=3))
    other = calibrate(seed=4).sites["transformer_blocks.0.ff.net.2"]
    assert not torch.equal(first.sites["transformer_blocks.0.ff.net.2"].maximum, other.maximum)


def test_save_and_load(tmp_path):
    statistics = calibrate()
    statistics.save(tmp_path / "stats.safetensors")
    loaded = dq.Statistics.load(tmp_path / "stats.safetensors")
    assert_same(statistics, loaded)
    assert loaded.about == statistics.about
    assert [path.name for path in tmp_path.iterdir()] == ["stats.safetensors"]
    loaded.check_model(tiny_dit())


def test_memory_is_what_the_docstring_says():
    pipe = tiny_pipeline()
    one, two = calibrate(pipe, CALLS[:1]), calibrate(pipe, CALLS)
    for name, site in two.sites.items():
        channels = site.minimum.shape[1]
        # four vectors a forward reach a modulation linear, which is fewer than the eight tokens kept of others
        kept = site.tokens.shape[1]
        assert kept <= 8
        held = site.minimum.nbytes + site.maximum.nbytes + site.tokens.nbytes
        assert held == STEPS * channels * (8 + 2 * kept) <= 24 * STEPS * channels
        assert one.sites[name].minimum.shape == site.minimum.shape


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_hooks_and_progress_settings_are_as_before_after_an_interruption(error):
    pipe = tiny_pipeline()
    before = count_hooks(pipe.transformer)
    settings = dict(pipe._progress_bar_config)
    handle = pipe.transformer.transformer_blocks[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(error()))
    with pytest.raises(error):
        calibrate(pipe)
    handle.remove()
    assert count_hooks(pipe.transformer) == before
    assert pipe._progress_bar_config == settings
    calibrate(pipe)
    assert count_hooks(pipe.transformer) == before


def test_an_interrupted_run_resumes_to_the_same_statistics(tmp_path):
    path = tmp_path / "unfinished.safetensors"
    pipe = tiny_pipeline()
    forwards = []

    def interrupt(*_):
        forwards.append(1)
        if len(forwards) == STEPS + 2:  # in the second of two calls
            raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, checkpoint=path)
    handle.remove()
    assert dq.Statistics.load(path).about["calls_done"] == 1
    counted = []
    pipe.transformer.register_forward_pre_hook(lambda *_: counted.append(1))
    resumed = calibrate(pipe, checkpoint=path)
    assert len(counted) == STEPS, "only the second call runs again"
    assert_same(resumed, calibrate())
    calibrate(pipe, checkpoint=path)
    assert len(counted) == STEPS, "a finished run is not repeated"


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    calibrate(checkpoint=path)
    with pytest.raises(ValueError, match="another run: its seed is 0, now it is 1"):
        calibrate(checkpoint=path, seed=1)
    with pytest.raises(ValueError, match="with other weights"):
        calibrate(tiny_pipeline(seed=9), checkpoint=path)


class SequentialGuidance(type(tiny_pipeline())):
    """Two forwards a step, one a guidance branch, and a callback: as FLUX, SD3 or Wan pipelines do it."""

    def __call__(
        self, class_labels, generator=None, num_inference_steps=5, callback_on_step_end=None, return_dict=True
    ):
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            for label in (*class_labels, 1000):
                # positional, as HunyuanDiT and Z-Image pass it
                noise = self.transformer(latents, t[None], torch.tensor([label])).sample
            latents = self.scheduler.step(noise, t, latents).prev_sample
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, t, {})
        return (latents,)


def test_sequential_guidance_positional_timesteps_and_the_callers_callback():
    base = tiny_pipeline()
    pipe = SequentialGuidance(base.transformer, base.vae, base.scheduler)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(step)
        return tensors

    statistics = calibrate(pipe, [dict(class_labels=[3], callback_on_step_end=callback)])
    assert seen == list(range(STEPS))
    assert len(statistics.timesteps) == STEPS


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_no_numbers_name_module_and_step(value):
    pipe = tiny_pipeline()
    calls = []

    def poison(module, args, output):
        calls.append(1)
        if len(calls) == 3:
            output = output.clone()
            output[0, 0, 0] = value
        return output

    pipe.transformer.transformer_blocks[1].ff.net[0].register_forward_hook(poison)
    with pytest.raises(ValueError, match=r"transformer_blocks.1.ff.net.2 received NaN or infinite values at step 2"):
        calibrate(pipe)


def test_arguments_are_checked_before_anything_runs():
    pipe = tiny_pipeline()
    with pytest.raises(TypeError, match=r"calls\[1\].*'prompt'.*DiTPipeline takes: class_labels"):
        calibrate(pipe, [CALLS[0], dict(class_labels=[1], prompt="a cat")])
    with pytest.raises(ValueError, match="non-empty list of dicts"):
        calibrate(pipe, CALLS[0])
    with pytest.raises(ValueError, match="non-empty list"):
        calibrate(pipe, [])
    with pytest.raises(ValueError, match=r"calls\[0\] sets num_inference_steps"):
        calibrate(pipe, [dict(class_labels=[1], num_inference_steps=3)])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        dq.calibrate(pipe, CALLS, num_inference_steps=0)


def test_a_quantized_model_is_not_calibrated():
    pipe = tiny_pipeline()
    dq.quantize(pipe, dq.DQConfig("rtn"), progress=False)
    with pytest.raises(ValueError, match="quantized already"):
        calibrate(pipe)


def test_what_is_no_diffusion_transformer_is_named():
    with pytest.raises(ValueError, match="expected a diffusers pipeline or transformer, got Linear"):
        denoiser(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"AutoencoderKL.forward has no argument named timestep"):
        TimestepArgument.of(tiny_pipeline().vae)


def test_linears_of_an_unknown_architecture_are_grouped_by_the_tensor_they_receive(tiny_unknown, run_unknown):
    model = tiny_unknown().transformer
    recorder = _Recorder(model, seed=0)
    with recorder.attached():
        run_unknown(model)
    groups = set(recorder.linears.values())
    block = "transformer_blocks.0.attn"
    assert (f"{block}.to_q", f"{block}.to_k", f"{block}.to_v") in groups
    assert (f"{block}.add_q_proj", f"{block}.add_k_proj", f"{block}.add_v_proj") in groups
    assert ("transformer_blocks.0.ff.net.2",) in groups
    members = [linear for group in groups for linear in group]
    assert len(members) == len(set(members)), "no linear is in two groups"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[: len(data) // 2], "damaged or cut short"),
        (lambda data: b"not a safetensors file", "damaged or cut short"),
        (lambda data: b"", "damaged or cut short"),
    ],
)
def test_a_damaged_statistics_file_is_refused(tmp_path, damage, message):
    path = tmp_path / "stats.safetensors"
    calibrate().save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        dq.Statistics.load(path)


def test_another_safetensors_file_and_a_missing_one(tmp_path):
    tiny_dit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not one of statistics"):
        dq.Statistics.load(tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(FileNotFoundError, match="no statistics file at"):
        dq.Statistics.load(tmp_path / "nothing.safetensors")


def test_statistics_know_their_checkpoint_in_any_dtype_and_refuse_another():
    statistics = calibrate()
    statistics.check_model(tiny_dit().to(torch.bfloat16))
    with pytest.raises(ValueError, match="with other weights"):
        statistics.check_model(tiny_dit(seed=1))
    with pytest.raises(ValueError, match="of another size"):
        statistics.check_model(tiny_dit(num_layers=3))
    with pytest.raises(ValueError, match="are of a DiTTransformer2DModel, the model is a Linear"):
        statistics.check_model(nn.Linear(2, 2))


def test_another_scheduler_visits_other_timesteps():
    pipe = tiny_pipeline()
    pipe.scheduler = DDIMScheduler(timestep_spacing="trailing")
    assert not torch.equal(calibrate(pipe).timesteps, calibrate().timesteps)


class RisingTimesteps(type(tiny_pipeline())):
    """Noise at timestep 0, data at 999, as Lumina and Z-Image count."""

    def __call__(self, class_labels, generator=None, num_inference_steps=5, schedule=None, return_dict=True):
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        for t in schedule or [i * 1000 // num_inference_steps for i in range(num_inference_steps)]:
            latents = self.transformer(latents, torch.tensor([t]), torch.tensor(class_labels)).sample
        return (latents,)


def rising(pipe):
    return RisingTimesteps(pipe.transformer, pipe.vae, pipe.scheduler)


def test_rising_timesteps_are_kept_in_the_order_of_denoising_and_select_the_same_group():
    pipe = tiny_pipeline()
    statistics = dq.calibrate(rising(pipe), [dict(class_labels=[3])], num_inference_steps=10, progress=False)
    assert not statistics.descending
    assert statistics.timesteps.tolist() == [i * 100 for i in range(10)]
    dq.quantize(pipe, dq.DQConfig("htg", groups=2), statistics=statistics, progress=False)
    model = pipe.transformer
    latents, label = torch.randn(1, 4, 8, 8), torch.tensor([3])
    groups = []
    for t in (0, 900):
        model(latents, torch.tensor([t]), label)
        groups.append(int(model.timestep_groups.index.max()))
    assert groups == [0, 1]
    model.timestep_groups.select(model.timestep_boundaries, torch.tensor([0, 999]), descending=False)
    assert int(model.timestep_groups.index.max()) == 0, "the noisiest token decides"


@pytest.mark.parametrize("reverse", [False, True])
def test_calls_of_different_schedules_are_merged_in_the_order_of_denoising(reverse):
    schedules = [[0, 400, 800], [100, 500, 900]]
    calls = [dict(class_labels=[3], schedule=schedule) for schedule in schedules]
    pipe = rising(tiny_pipeline())
    statistics = dq.calibrate(pipe, calls[:: -1 if reverse else 1], num_inference_steps=3, progress=False)
    assert statistics.timesteps.tolist() == [0, 100, 400, 500, 800, 900]
    for site in statistics.sites.values():
        assert len(site.minimum) == 6


def test_of_many_timesteps_in_a_batch_the_noisiest_counts():
    seen = []
    model = tiny_dit()
    with watching_timestep(model, seen.append):
        model(torch.zeros(2, 4, 8, 8), torch.tensor([10, 700]), torch.tensor([1, 1]))
    assert seen == [700]


def test_a_checkpoint_knows_the_content_of_its_calls_and_the_schedulers_settings(tmp_path):
    path = tmp_path / "run.safetensors"
    pipe = rising(tiny_pipeline())
    call = dict(class_labels=torch.tensor([3] * 100)[:1].repeat(1), schedule=None)
    dq.calibrate(pipe, [call], num_inference_steps=3, checkpoint=path, progress=False)
    other = dict(call, class_labels=torch.tensor([4]))
    with pytest.raises(ValueError, match="another run: its arguments"):
        dq.calibrate(pipe, [other], num_inference_steps=3, checkpoint=path, progress=False)
    pipe.scheduler = DDIMScheduler(timestep_spacing="trailing")
    with pytest.raises(ValueError, match="another run: its scheduler"):
        dq.calibrate(pipe, [call], num_inference_steps=3, checkpoint=path, progress=False)


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(tmp_path):
    pipe = tiny_pipeline()
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        calibrate(pipe, checkpoint=tmp_path / "nothing" / "run.safetensors")
    with pytest.raises(IsADirectoryError, match="give the path of a file"):
        calibrate(pipe, checkpoint=tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(calls=[5]), "non-empty list of dicts"),
        (dict(calls=[{}]), "missing a required argument: 'class_labels'"),
        (dict(num_inference_steps=2.5), "num_inference_steps must be of type int; got 2.5"),
        (dict(seed="a"), "seed must be of type int; got 'a'"),
        (dict(pipe=tiny_dit()), "expected a diffusers pipeline, which makes the calls; got DiTTransformer2DModel"),
    ],
)
def test_wrong_types_are_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        dq.calibrate(**{"pipe": tiny_pipeline(), "calls": CALLS, "num_inference_steps": 2, **arguments})


def test_a_pipeline_with_two_denoisers_is_refused():
    pipe = tiny_pipeline()
    pipe.transformer_2 = pipe.transformer
    with pytest.raises(ValueError, match="two denoisers, each with steps"):
        calibrate(pipe)
    with pytest.raises(ValueError, match="two denoisers"):
        dq.quantize(pipe, dq.DQConfig("rtn"))


def test_second_moments_are_sums_over_all_tokens():
    """Of what each linear is given, told by hooks of our own."""
    pipe, seen = tiny_pipeline(), []
    name = "transformer_blocks.1.attn1.to_q"
    handle = pipe.transformer.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    statistics = dq.calibrate(pipe, CALLS, num_inference_steps=3, second_moments=True, progress=False)
    handle.remove()
    site, steps = statistics.sites[name], len(statistics.timesteps)
    tokens = [x.reshape(-1, x.shape[-1]).double() for x in seen]
    assert len(tokens) == steps * len(CALLS)
    assert site.counts.tolist() == [sum(len(x) for x in tokens[t::steps]) for t in range(steps)]
    sums = torch.stack([sum(x.sum(0) for x in tokens[t::steps]) for t in range(steps)])
    assert torch.allclose(site.sums.double(), sums, rtol=1e-5, atol=1e-3)  # fp32 sums of some hundred terms
    assert torch.allclose(site.products.double(), sum(x.T @ x for x in tokens), rtol=1e-4, atol=1e-3)
    assert statistics.sites[f"{name}:output"].products is None, "nothing asks for those"


def test_second_moments_survive_saving_and_an_interruption(tmp_path):
    arguments = dict(num_inference_steps=3, second_moments=True, progress=False)
    whole = dq.calibrate(tiny_pipeline(), CALLS, **arguments)
    whole.save(tmp_path / "s.safetensors")
    read = dq.Statistics.load(tmp_path / "s.safetensors")
    checkpoint = tmp_path / "c.safetensors"
    pipe, calls = tiny_pipeline(), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        dq.calibrate(pipe, CALLS, checkpoint=checkpoint, **arguments)
    handle.remove()
    resumed = dq.calibrate(pipe, CALLS, checkpoint=checkpoint, **arguments)
    for name, site in whole.sites.items():
        for key, tensor in site.tensors().items():
            assert torch.equal(read.sites[name].tensors()[key], tensor)
            assert torch.equal(resumed.sites[name].tensors()[key], tensor), (name, key)


def test_adapters_are_refused_before_hours_of_work():
    from peft import LoraConfig, inject_adapter_in_model

    pipe = tiny_pipeline()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), pipe.transformer)
    with pytest.raises(ValueError, match="an adapter sits on transformer_blocks.0.attn1.to_q"):
        calibrate(pipe)


def test_timesteps_in_other_units_are_told(caplog):
    pipe = tiny_pipeline(num_embeds_ada_norm=5000)
    pipe.scheduler = DDIMScheduler(num_train_timesteps=5000)
    calibrate(pipe)
    assert "its pipelines pass 999 (noise) to 0" in caplog.text
