# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import CALLS, PIXART_CALL, tiny_pipeline, tiny_pixart_pipeline

import diffusers_dq as dq
from diffusers_dq.model_inputs import capture, pack, places, timestep_of, unpack


@given(samples=st.integers(1, 40), calls=st.integers(1, 5), steps=st.integers(1, 30))
def test_kept_steps_are_spread_over_schedule_and_calls(samples, calls, steps):
    kept = places(samples, calls, steps)
    assert len(kept) <= samples
    assert all(call < calls and step < steps for call, step in kept)
    visited = sorted({step for _, step in kept})
    assert len(visited) == min(samples, steps)
    if samples >= calls:
        assert {call for call, _ in kept} == set(range(calls))


def test_an_input_survives_packing_and_equal_tensors_are_kept_once():
    prompt, latent = torch.randn(1, 5, 8, dtype=torch.bfloat16), torch.randn(2, 3)
    samples = [
        capture(["x", "t"], (latent + i, i), {"prompt": prompt, "more": {"size": None, "list": [latent, 2.5]}})
        for i in range(3)
    ]
    structures, tensors = pack(samples)
    assert len(tensors) == 4, "three latents, of which one is in the list too, and a prompt"
    for sample, restored in zip(samples, unpack(structures, tensors), strict=True):
        assert torch.equal(sample["x"], restored["x"]) and restored["t"] == sample["t"]
        assert torch.equal(restored["prompt"], prompt) and restored["more"]["list"][1] == 2.5
        assert restored["more"]["size"] is None


def test_a_tuple_stays_a_tuple():
    """Cosmos tells two contexts from one by it."""
    sample = capture([], (), {"contexts": (torch.zeros(2), None), "list": [torch.zeros(2)]})
    (restored,) = unpack(*pack([sample]))
    assert type(restored["contexts"]) is tuple and restored["contexts"][1] is None
    assert type(restored["list"]) is list


def test_an_object_no_file_could_hold_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match="processor of type object.*samples=0"):
        capture([], (), {"processor": object()})


@pytest.mark.parametrize("build, calls", [(tiny_pipeline, CALLS), (tiny_pixart_pipeline, [PIXART_CALL])])
@torch.no_grad()
def test_a_kept_input_repeats_the_forward(build, calls, tmp_path):
    """Outputs of the run and of the repetition are compared bit by bit, after a round trip through a file."""
    pipe = build()
    outputs: dict[float, torch.Tensor] = {}
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: outputs.update(
            {float(torch.as_tensor(kwargs["timestep"]).max()): output[0]}
        ),
        with_kwargs=True,
    )
    dq.calibrate(pipe, calls[:1], num_inference_steps=6, samples=3, progress=False).save(tmp_path / "s")
    hook.remove()
    statistics = dq.Statistics.load(tmp_path / "s")
    assert len(statistics.samples) == 3
    for sample in statistics.samples:
        timestep = float(timestep_of(sample, "timestep").max())
        assert torch.equal(pipe.transformer(**sample)[0], outputs[timestep])


def test_a_file_without_the_samples_it_names_is_refused(dit_statistics, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "s"
    dit_statistics.save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["samples/0"]
    save_file(tensors, path, metadata={"diffusers_dq": metadata["diffusers_dq"].partition(" ")[2]})  # no checksum
    with pytest.raises(ValueError, match="samples its header names"):
        dq.Statistics.load(path)
