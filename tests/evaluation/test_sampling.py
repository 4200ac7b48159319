# SPDX-License-Identifier: Apache-2.0
"""Sets of pictures: the same ones whoever makes them, in whatever pieces."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from support import PIXART_CALL, tiny_pipeline, tiny_pixart_pipeline

from diffusers_dq.denoise import run_call
from diffusers_dq.evaluation import PictureSet, Sampling, sample
from diffusers_dq.evaluation import sampling as sampling_module

SETTINGS = dict(images=7, steps=2, batch=3, seed=5, guidance=1.5, classes=range(20))


class Share:
    """Of process `index` of `processes`, in the place of accelerate's state."""

    def __init__(self, index: int, processes: int) -> None:
        self.process_index, self.num_processes = index, processes

    def wait_for_everyone(self) -> None:
        pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A set made in one go."""
    return sample(tiny_pipeline(), Sampling(**SETTINGS), tmp_path_factory.mktemp("whole") / "set", progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_picture_is_the_one_of_its_seed_and_class(whole):
    """Alone, in a batch of one: other sums in its matrix products, so a rounding to 8 bits may go the other way."""
    pixels = whole.first(7)
    for i in (0, 4, 6):
        call = dict(class_labels=[i % 20], guidance_scale=1.5)
        alone = run_call(tiny_pipeline(), call, num_inference_steps=2, seed=5 + i, output_type="np")
        assert np.abs(pixels[i] - 255.0 * alone[0]).max() <= 0.5 + 1e-2
    assert len(np.unique(pixels, axis=0)) == 7


def test_an_interrupted_run_ends_with_the_very_same_files(whole, tmp_path, monkeypatch):
    def interrupted(file, pixels):
        monkeypatch.undo()
        file.write(b"half a batch")
        raise KeyboardInterrupt

    settings = Sampling(**SETTINGS)
    with monkeypatch.context() as patch:
        calls = []

        def stop_at_the_second(pipe, sampling, first, last, make=sampling_module._pictures):
            calls.append(first)
            if len(calls) == 2:
                patch.setattr(sampling_module.np, "savez", interrupted)
            return make(pipe, sampling, first, last)

        patch.setattr(sampling_module, "_pictures", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            sample(tiny_pipeline(), settings, tmp_path, progress=False)
    assert sorted(contents(tmp_path)) == ["pictures-00000000.npz", "settings.json"], "nothing half is left"
    with pytest.raises(ValueError, match="not finished: 2 of 3 batches are missing, pictures-00000003.npz first"):
        PictureSet.open(tmp_path)
    before = (tmp_path / "pictures-00000000.npz").stat().st_mtime_ns
    sample(tiny_pipeline(), settings, tmp_path, progress=False)
    assert contents(tmp_path) == contents(whole.place)
    assert (tmp_path / "pictures-00000000.npz").stat().st_mtime_ns == before, "what was there is not made again"


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_make_the_very_same_files_together(whole, tmp_path, processes):
    for index in reversed(range(processes)):
        state = Share(index, processes)
        if index:
            with pytest.raises(ValueError, match="not finished"):
                sample(tiny_pipeline(), Sampling(**SETTINGS), tmp_path, state=state, progress=False)
        else:
            sample(tiny_pipeline(), Sampling(**SETTINGS), tmp_path, state=state, progress=False)
    assert contents(tmp_path) == contents(whole.place)


def test_noise_that_a_scheduler_draws_does_not_depend_on_who_draws_it(tmp_path):
    pipe = tiny_pipeline()
    pipe.scheduler = DDPMScheduler()
    before = torch.get_rng_state()
    whole = sample(pipe, Sampling(**SETTINGS), tmp_path / "whole", progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    for index in (1, 0):
        try:
            sample(pipe, Sampling(**SETTINGS), tmp_path / "two", state=Share(index, 2), progress=False)
        except ValueError:
            assert index == 1, "the second process alone does not finish the set"
    assert contents(tmp_path / "two") == contents(whole.place)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=3), "steps 2, now 3"),
        (dict(seed=6, guidance=2.0), "guidance 1.5, now 2.0; seed 5, now 6"),
        (dict(images=8), "images 7, now 8"),
        (dict(classes=[1]), r"classes \[0, 1, 2.*now \[1\]"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(whole, changes, message):
    before = contents(whole.place)
    with pytest.raises(ValueError, match=f"other settings: {message}.*Give the same, or another folder"):
        sample(tiny_pipeline(), Sampling(**{**SETTINGS, **changes}), whole.place, progress=False)
    assert contents(whole.place) == before


def test_another_model_in_the_same_folder_is_refused(whole):
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias[0] += 1e-6
    with pytest.raises(ValueError, match="other settings: model"):
        sample(pipe, Sampling(**SETTINGS), whole.place, progress=False)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "pictures-00000000.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="holds something without settings.json"):
        sample(tiny_pipeline(), Sampling(**SETTINGS), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(images=0), "images must be at least 1, got 0"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(batch=-1), "batch must be at least 1, got -1"),
        (dict(seed=-1), "seed must be at least 0, got -1"),
        (dict(prompts=["a"]), "classes or prompts, not both"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{**SETTINGS, **changes})


def test_conditions_that_do_not_fit_the_pipeline_are_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "set"
    for changes, error, message in [
        (dict(classes=()), ValueError, "is told a class: give --classes"),
        (dict(classes=(), prompts=["a cat"]), ValueError, "is told a class"),
        (dict(arguments={"heigth": 5}), TypeError, "unexpected keyword argument 'heigth'. It takes: class_labels"),
    ]:
        with pytest.raises(error, match=message):
            sample(tiny_pipeline(), Sampling(**{**SETTINGS, **changes}), folder, progress=False)
    with pytest.raises(ValueError, match="is told a prompt: give --prompts"):
        sample(tiny_pixart_pipeline(), Sampling(images=1, steps=1), folder, progress=False)
    assert not folder.exists()


def test_pictures_of_another_size_are_found_at_the_first_batch(tmp_path):
    with pytest.raises(ValueError, match="of 8 x 8 pixels, those of the reference of 32 x 32"):
        sample(tiny_pipeline(), Sampling(**SETTINGS), tmp_path, size=(32, 32), progress=False)
    assert list(contents(tmp_path)) == ["settings.json"]


def test_prompts_are_taken_in_turn_and_arguments_are_passed_on():
    settings = Sampling(images=5, steps=1, batch=2, prompts=["a", "b", "c"], arguments={"height": 64})
    assert settings.call(2, 4) == {"height": 64, "prompt": ["c", "a"]}


def test_a_text_pipeline_is_sampled_from_embeddings(tmp_path):
    arguments = {key: value for key, value in PIXART_CALL.items() if key != "negative_prompt"}
    settings = Sampling(images=2, steps=1, batch=1, arguments={**arguments, "negative_prompt": None})
    pictures = sample(tiny_pixart_pipeline(), settings, tmp_path, progress=False)
    assert pictures.first(2).shape == (2, 16, 16, 3)


class Painter(DiffusionPipeline):
    """Pictures whose red is the prompt's number and whose blue is the seed's first random number."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)
        self.paint = np.float32(1)
        self.frames = ()

    def __call__(
        self, prompt, generator, num_inference_steps=1, guidance_scale=1.0, output_type="pil", return_dict=True
    ):
        colours = [
            [int(text) / 255, 0.0, torch.rand((), generator=g)] for text, g in zip(prompt, generator, strict=True)
        ]
        images = np.array(colours, dtype=np.float32)[:, None, None] * np.ones((4, 4, 1), dtype=np.float32) * self.paint
        return (images.reshape(len(images), *self.frames, 4, 4, 3),)


def test_a_picture_has_the_prompt_of_its_index_and_the_noise_of_its_seed(tmp_path):
    settings = Sampling(images=7, steps=1, batch=3, seed=9, prompts=["10", "20"])
    pixels = sample(Painter(DDPMScheduler()), settings, tmp_path, progress=False).first(7)
    assert pixels[:, 0, 0, 0].tolist() == [10, 20, 10, 20, 10, 20, 10]
    noise = [float(torch.rand((), generator=torch.Generator().manual_seed(9 + i))) for i in range(7)]
    np.testing.assert_allclose(pixels[:, 0, 0, 2], 255 * np.array(noise), atol=0.5 + 1e-4)  # rounded to 8 bits
    with pytest.raises(ValueError, match="other settings: prompts"):
        sample(Painter(DDPMScheduler()), replace(settings, prompts=["10", "21"]), tmp_path, progress=False)
    with pytest.raises(ValueError, match="is told a prompt: give --prompts"):
        sample(Painter(DDPMScheduler()), replace(settings, prompts=()), tmp_path / "none", progress=False)


def test_videos_and_pictures_that_are_not_finite_are_refused(tmp_path):
    settings, pipe = Sampling(images=2, steps=1, prompts=["1"]), Painter(DDPMScheduler())
    pipe.paint = np.float32("nan")
    with pytest.raises(ValueError, match="pictures 0 to 1 are not finite: the model has diverged"):
        sample(pipe, settings, tmp_path, progress=False)
    pipe.frames = (1,)
    with pytest.raises(ValueError, match=r"an output of shape \[2, 1, 4, 4, 3\] .* no videos"):
        sample(pipe, settings, tmp_path, progress=False)
    assert list(contents(tmp_path)) == ["settings.json"]


SCRIPT = """
import sys, torch
sys.path[:0] = [{tests!r}]
torch.set_num_threads(1)
from accelerate import PartialState
from support import tiny_pipeline
from diffusers_dq.evaluation import Sampling, sample
state = PartialState(cpu=True)
assert state.num_processes == 2
sample(tiny_pipeline(), Sampling(**{settings!r}), {folder!r}, state=state, progress=False)
"""


@pytest.mark.slow
def test_two_real_processes_make_the_very_same_files(whole, tmp_path):
    """By torchrun: `accelerate launch` starts several processes on GPUs, but on CPUs only through MPI."""
    script, folder = tmp_path / "script.py", tmp_path / "set"
    tests = str(Path(__file__).parents[1])
    script.write_text(SCRIPT.format(tests=tests, settings=SETTINGS, folder=str(folder)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(folder) == contents(whole.place)
    assert json.loads((folder / "settings.json").read_text())["images"] == 7
