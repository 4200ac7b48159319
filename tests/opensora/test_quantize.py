# SPDX-License-Identifier: Apache-2.0
"""Calibrated, quantized, saved, and the same video from a fresh process."""

import subprocess
import sys

import pytest
import torch

import diffusers_dq as dq
from diffusers_dq.evaluation.loading import load_pipeline
from diffusers_dq.opensora import OpenSora12Pipeline, OpenSoraPipeline

RELOAD = """
import sys
import torch
import diffusers_dq
from diffusers_dq.opensora import OpenSoraPipeline, OpenSora12Pipeline
for folder in sys.argv[1:]:
    call = torch.load(f"{folder}/call.pt", weights_only=True)
    kind = OpenSoraPipeline if folder.endswith("OpenSoraPipeline") else OpenSora12Pipeline
    pipe = kind.from_pretrained(folder)
    frames = pipe(**call, num_inference_steps=3, generator=torch.Generator().manual_seed(5)).frames
    torch.save(frames, f"{folder}/frames.pt")
"""


def sample(pipe, call):
    return pipe(**call, num_inference_steps=3, generator=torch.Generator().manual_seed(5)).frames


def test_a_saved_pipeline_makes_the_same_video_in_a_fresh_process(pipe_v1, pipe_v3, call_v1, call_v3, tmp_path):
    expected = {}
    for pipe, call in ((pipe_v1, {**call_v1, "output_type": "latent"}), (pipe_v3, call_v3)):
        full = sample(pipe, call)
        statistics = dq.calibrate(pipe, [call], num_inference_steps=4, progress=False)
        assert len(statistics.timesteps) == 4
        report = dq.quantize(pipe, dq.DQConfig("htg"), statistics=statistics, progress=False)
        left = {name for name in report.kept if "transformer_blocks" in name}
        assert left and all("attn2.to_k" in name or "attn2.to_v" in name for name in left)
        folder = tmp_path / type(pipe).__name__
        expected[folder] = sample(pipe, call)
        assert not torch.equal(expected[folder], full)  # how close: tests/test_pipelines.py
        pipe.save_pretrained(folder)
        torch.save(call, folder / "call.pt")
    subprocess.run([sys.executable, "-c", RELOAD, *map(str, expected)], check=True, capture_output=True)
    for folder, frames in expected.items():
        assert torch.equal(torch.load(folder / "frames.pt", weights_only=True), frames)


def test_modulations_carry_what_htg_changes(pipe_v1, call_v1):
    """Nothing is left to be changed online where a norm is modulated."""
    statistics = dq.calibrate(pipe_v1, [call_v1], num_inference_steps=4, progress=False)
    report = dq.quantize(pipe_v1, dq.DQConfig("htg"), statistics=statistics, progress=False)
    reasons = {row.name: row.reason for row in report.linears}
    for i in range(2):
        assert f"transformer_blocks.{i}.timestep_modulation" in reasons
        assert not reasons[f"transformer_blocks.{i}.attn1.to_q"] + reasons[f"transformer_blocks.{i}.ff.net.0.proj"]


@pytest.mark.parametrize("pipeline", [OpenSoraPipeline, OpenSora12Pipeline])
def test_a_pipeline_in_full_precision_is_quantized_while_it_loads(
    pipeline, pipe_v1, pipe_v3, call_v1, call_v3, tmp_path
):
    from diffusers import PipelineQuantizationConfig

    pipe, call = (
        (pipe_v1, {**call_v1, "output_type": "latent"}) if pipeline is OpenSoraPipeline else (pipe_v3, call_v3)
    )
    pipe.save_pretrained(tmp_path)
    plain = pipeline.from_pretrained(tmp_path)
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(sample(plain, call), sample(pipe, call))
    config = PipelineQuantizationConfig(quant_mapping={"transformer": dq.DQConfig("rtn")})
    loaded = pipeline.from_pretrained(tmp_path, quantization_config=config)
    loaded.set_progress_bar_config(disable=True)
    dq.quantize(pipe, dq.DQConfig("rtn"), progress=False)
    assert torch.equal(sample(loaded, call), sample(pipe, call))


@pytest.mark.parametrize("which", ["pipe_v1", "pipe_v3"])
def test_folders_are_known_for_what_they_are(which, request, tmp_path):
    """By `dq.inspect` and by the commands, which do not know the class; diffusers' loaders know theirs alone."""
    pipe = request.getfixturevalue(which)
    dq.quantize(pipe, dq.DQConfig("rtn"), progress=False)
    pipe.save_pretrained(tmp_path)
    assert str(dq.inspect(tmp_path)) == str(dq.inspect(pipe)) == str(dq.inspect(tmp_path / "transformer"))
    assert type(load_pipeline(str(tmp_path), "float32", "cpu")) is type(pipe)


def test_comparing_two_pipelines_of_videos(pipe_v1, call_v1):
    from copy import deepcopy

    reference = deepcopy(pipe_v1)
    dq.quantize(pipe_v1, dq.DQConfig("rtn"), progress=False)
    call = dict(call_v1, height=16, width=16)
    comparison = dq.compare(reference, pipe_v1, [call], num_inference_steps=2, progress=False)
    assert comparison.images_reference.shape == (2, 16, 16, 3) and comparison.mean_psnr > 20


@torch.no_grad()
@pytest.mark.parametrize("which", ["pipe_v1", "pipe_v3"])
def test_low_rank_adapters_attach(which, request, draw):
    """By peft, to the linears that other diffusers transformers have."""
    from peft import LoraConfig

    model = request.getfixturevalue(which).transformer
    inputs = draw(1, 4, 2, 4, 4).float(), 500, draw(1, 6, 24).float()
    before = model(*inputs).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.allclose(model(*inputs).sample, before)
    model.disable_adapters()
    # not bit for bit: peft freezes the weights, for which torch's CPU kernels sum in another order
    assert torch.allclose(model(*inputs).sample, before, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("which", ["pipe_v1", "pipe_v3"])
def test_one_graph_holds_the_whole_model(which, request, draw):
    """No break, and no second graph for another timestep."""
    model = request.getfixturevalue(which).transformer
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    for t in (999, 500, 3):
        inputs = draw(1, 4, 2, 4, 4).float(), torch.tensor([t]), draw(1, 6, 24).float(), torch.ones(1, 6)
        assert torch.allclose(compiled(*inputs).sample, model(*inputs).sample, atol=1e-5)
    assert len(graphs) == 1
