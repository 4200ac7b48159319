# SPDX-License-Identifier: Apache-2.0
"""Several models in one process, threads, copies, processes: each computes what it would alone, bit by bit."""

import copy
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import spawned
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file
from support import CALLS, PIXART_CALL, tiny_pixart_pipeline

import diffusers_dq as dq
from diffusers_dq.linear import QuantizedLinear

# of every kind of state: groups, shared inputs, guard steps, attention processors, noise correction, modulations
CONFIGS = {
    "htg": dict(method="htg", weight_bits=4, groups=5, scope="layer", ranges="group", online=True),
    "guarded": dict(method="htg", groups=3, guard_steps=(1, 1), noise_correction=True),
    "dynamic": dict(method="rtn", weight_bits=4),
    "attention": dict(method="qdit", weight_bits=4, quantize_attention=True),
}
STEPS = 6


@pytest.fixture(scope="module")
def build(dit_folder, dit_statistics):
    """A function: a pipeline of one's own, quantized as CONFIGS says."""
    made = {}

    def quantized(name):
        if name not in made:
            pipe = DiTPipeline.from_pretrained(dit_folder)
            pipe.set_progress_bar_config(disable=True)
            dq.quantize(pipe, dq.DQConfig(**CONFIGS[name]), statistics=dit_statistics, progress=False)
            made[name] = pipe
        return copy.deepcopy(made[name])

    return quantized


@pytest.fixture(scope="module")
def pixart():
    """A function: a PixArt pipeline whose blocks are called with changed modulations."""
    built = tiny_pixart_pipeline()
    call = {**PIXART_CALL, "output_type": "latent"}
    statistics = dq.calibrate(built, [PIXART_CALL], num_inference_steps=STEPS, progress=False)

    def quantized():
        pipe = copy.deepcopy(built)
        dq.quantize(pipe, dq.DQConfig("htg", groups=3), statistics=statistics, progress=False)
        return pipe, call

    return quantized


def generate(pipe, seed):
    """Noise of a generator of its own: torch's global one is shared by all threads."""
    generator = torch.Generator().manual_seed(seed)
    return torch.from_numpy(
        pipe([1, 2], generator=generator, num_inference_steps=STEPS, output_type="np", guidance_scale=1.0).images
    )


def test_pipelines_of_every_method_interleaved_step_by_step_do_not_mix(build, run_dit):
    """Each forward of one lies between those of the others, at another timestep."""
    models = {name: build(name).transformer for name in CONFIGS}
    timesteps = [950, 700, 500, 300, 20]
    alone = {name: [run_dit(model, (t,)) for t in timesteps] for name, model in models.items()}
    for i in range(len(timesteps)):
        for shift, (name, model) in enumerate(models.items()):
            at = (i + shift) % len(timesteps)
            assert torch.equal(run_dit(model, (timesteps[at],)), alone[name][at]), (name, timesteps[at])


@pytest.mark.parametrize("name", CONFIGS)
def test_threads_with_a_copy_each_generate_what_one_does_alone(build, name):
    pipe = build(name)
    alone = [generate(pipe, seed) for seed in range(4)]
    assert not torch.equal(alone[0], alone[1])
    copies = [copy.deepcopy(pipe) for _ in alone]
    with ThreadPoolExecutor(len(copies)) as pool:
        together = list(pool.map(generate, copies, range(4)))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_threads_with_another_method_each(build):
    pipes = {name: build(name) for name in CONFIGS}
    alone = {name: generate(pipe, 3) for name, pipe in pipes.items()}
    with ThreadPoolExecutor(len(pipes)) as pool:
        together = dict(zip(pipes, pool.map(lambda pipe: generate(pipe, 3), pipes.values()), strict=True))
    assert all(torch.equal(alone[name], together[name]) for name in pipes)


def test_threads_of_a_model_with_changed_modulations(pixart):
    pipe, call = pixart()

    def latents(pipe, seed):
        return pipe(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed)).images

    alone = [latents(pipe, seed) for seed in range(3)]
    copies = [copy.deepcopy(pipe) for _ in alone]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(latents, copies, range(3)))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_threads_calibrate_and_quantize_at_once(dit_folder, run_dit):
    """Calls bring a generator: DiTPipeline would draw on torch's global one otherwise, as do others without. Models
    are loaded before: accelerate's init_empty_weights, in every from_pretrained, exchanges methods of nn.Module."""
    original = DiTPipeline.from_pretrained(dit_folder)

    def make(seed):
        pipe = copy.deepcopy(original)
        calls = [call | {"generator": torch.Generator().manual_seed(seed)} for call in CALLS]
        statistics = dq.calibrate(pipe, calls, num_inference_steps=STEPS, progress=False)
        dq.quantize(pipe, dq.DQConfig("htg", groups=3), statistics=statistics, progress=False)
        return run_dit(pipe.transformer)

    alone = [make(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(make, range(3)))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


# Copies


def tensors_of(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_deep_copy_shares_nothing_that_changes(build, run_dit, name):
    model = build(name).transformer
    twin = copy.deepcopy(model)
    expected = run_dit(model)
    mine, theirs = tensors_of(model), tensors_of(twin)
    assert mine.keys() == theirs.keys()
    assert not {tensor.data_ptr() for tensor in mine.values() if tensor.numel()} & {
        tensor.data_ptr() for tensor in theirs.values() if tensor.numel()
    }
    for module in twin.modules():
        if isinstance(module, QuantizedLinear):
            assert module.groups is twin.timestep_groups
    ours = {id(module) for module in model.modules()}
    for owner in twin.modules():
        for hook in (*owner._forward_pre_hooks.values(), *owner._forward_hooks.values()):
            assert id(hook) not in {id(h) for m in model.modules() for h in m._forward_pre_hooks.values()} or not any(
                id(value) in ours for value in vars(hook).values()
            )
    assert type(twin) is type(model)
    assert twin.hf_quantizer is not model.hf_quantizer
    assert twin.config.quantization_config is not model.config.quantization_config
    with torch.no_grad():
        for tensor in tensors_of(model).values():
            tensor.zero_()
    assert torch.equal(run_dit(twin), expected)


def test_a_copy_lives_on_without_the_original(build, run_dit):
    model = build("guarded").transformer
    expected, alive = run_dit(model), weakref.ref(model)
    twin = copy.deepcopy(model)
    del model
    gc.collect()
    assert alive() is None
    assert torch.equal(run_dit(twin), expected)
    with pytest.raises(ValueError, match="cannot be cast"):
        twin.to(torch.bfloat16)


def test_configs_and_statistics_pickle_and_copy(dit_statistics):
    for options in CONFIGS.values():
        config = dq.DQConfig(**options)
        for twin in (pickle.loads(pickle.dumps(config)), copy.copy(config), copy.deepcopy(config)):
            assert twin == config
        deep = copy.deepcopy(config)
        deep.overrides["*"] = {"weight_bits": 8}
        deep.options["another"] = 1
        assert "*" not in config.overrides and "another" not in config.options
    for twin in (pickle.loads(pickle.dumps(dit_statistics)), copy.copy(dit_statistics), copy.deepcopy(dit_statistics)):
        assert twin.sites.keys() == dit_statistics.sites.keys() and twin.about == dit_statistics.about
        assert twin.identity == dit_statistics.identity
        for name, site in twin.sites.items():
            theirs = dit_statistics.sites[name].tensors()
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in site.tensors().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pickled_model_comes_back(build, run_dit, name):
    """As multiprocessing and torch.save do it. Files are for save_pretrained: nothing here reads pickles of models."""
    model = build(name).transformer
    assert torch.equal(run_dit(pickle.loads(pickle.dumps(model))), run_dit(model))


# Processes

LOAD = """
import sys, torch
torch.set_num_threads(1)
import diffusers_dq
from diffusers import DiTPipeline
from safetensors.torch import save_file
pipe = DiTPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
seed = torch.Generator().manual_seed(3)
images = pipe([1, 2], generator=seed, num_inference_steps=6, output_type="np", guidance_scale=1.0).images
save_file({"images": torch.from_numpy(images)}, sys.argv[2])
"""


@pytest.mark.slow
def test_processes_load_and_run_one_folder_at_once(build, tmp_path):
    pipe = build("htg")
    pipe.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    environment = os.environ | {"HF_ENABLE_PARALLEL_LOADING": "yes", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(tmp_path / "model"), str(tmp_path / f"{i}")], env=environment
        )
        for i in range(3)
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    expected = generate(pipe, 3)
    for i in range(3):
        assert torch.equal(load_file(tmp_path / f"{i}")["images"], expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_shards_read_in_parallel_are_those_read_one_by_one(build, tmp_path, monkeypatch, run_dit, name):
    model = build(name).transformer
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
    for _ in range(3):
        assert torch.equal(run_dit(DiTTransformer2DModel.from_pretrained(tmp_path)), run_dit(model))


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("fork", marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")),
        pytest.param("spawn", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_processes_of_multiprocessing_load_and_run_at_once(build, tmp_path, method):
    """fork: after torch, diffusers and this package were imported, and a model has run. spawn: from nothing."""
    pipe = build("guarded")
    pipe.save_pretrained(tmp_path / "model")
    expected = generate(pipe, 5)
    context = multiprocessing.get_context(method)
    paths = [str(tmp_path / f"{i}") for i in range(3 if method == "fork" else 2)]
    running = [
        context.Process(target=spawned.generate, args=(str(tmp_path / "model"), path, STEPS, 5)) for path in paths
    ]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * len(running)
    assert all(torch.equal(load_file(path)["images"], expected) for path in paths)


def test_threads_generate_with_what_each_has_loaded_by_itself(build, tmp_path):
    """Loading takes turns: accelerate's init_empty_weights, in every from_pretrained, exchanges methods of nn.Module
    (diffusers 0.42); what one thread loads, others may run meanwhile."""
    pipes = {name: build(name) for name in CONFIGS}
    for name, pipe in pipes.items():
        pipe.save_pretrained(tmp_path / name)
    expected = {name: generate(pipe, 7) for name, pipe in pipes.items()}
    turn = threading.Lock()

    def load_and_generate(name):
        with turn:
            pipe = DiTPipeline.from_pretrained(tmp_path / name)
        pipe.set_progress_bar_config(disable=True)
        return generate(pipe, 7)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(load_and_generate, [*CONFIGS, *CONFIGS]))
    assert all(torch.equal(image, expected[name]) for name, image in zip([*CONFIGS, *CONFIGS], found, strict=True))
