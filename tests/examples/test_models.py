# SPDX-License-Identifier: Apache-2.0
"""The examples for real models, on the tiny ones that they bring along."""

import inspect
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import diffusers_dq as dq
from diffusers_dq import hub
from diffusers_dq.denoise import run_call

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = dict(height=16, width=16, max_sequence_length=16)
CALLS = {
    "dit": dict(class_labels=[1, 2]),
    "pixart": dict(prompt="a hat", use_resolution_binning=False, **SMALL),
    "flux": dict(prompt="a hat", **SMALL),
    "wan": dict(prompt="a hat", height=32, width=32, num_frames=9, max_sequence_length=16),
}
BITS = {"dit": "W4A8", "pixart": "W4A8", "flux": "W4A8", "wan": "W8A8"}
each = pytest.mark.parametrize("name", CALLS)


def check_written(name: str, folder: Path, printed: str) -> None:
    """A pipeline that loads and generates, statistics, a comparison, and what was printed of both."""
    statistics = dq.Statistics.load(folder / "statistics.safetensors")
    assert statistics.about["calls_done"] == statistics.about["calls"] >= 4
    comparison = json.loads((folder / "comparison" / "comparison.json").read_text())
    # Below 20 dB a picture is another one; random weights give the tiny models from 29 to 47 dB.
    assert comparison["mean_psnr"] > 20
    assert f"PSNR {comparison['mean_psnr']:.1f} dB" in printed
    assert "linears quantized" in printed
    pipe = DiffusionPipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert BITS[name] in {row.bits for row in dq.inspect(pipe).quantized}
    pictures = run_call(pipe, CALLS[name], num_inference_steps=2, seed=0, output_type="np")
    assert torch.isfinite(torch.as_tensor(pictures)).all() and pictures.std() > 0


@pytest.mark.parametrize("name", [*CALLS, "multi_gpu"])
def test_it_is_short_and_imports_no_other_script(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len(lines) < 100
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    packages = {"diffusers", "diffusers_dq", "torch", "accelerate", "tokenizers", "transformers"}
    assert imported <= packages | set(sys.stdlib_module_names)


@each
def test_it_writes_all_it_says_and_pushes_when_told(name, tmp_path, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr(dq, "push_to_hub", lambda pipe, repository, **more: pushed.append((pipe, repository, more)))
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)["main"]
    main(["--tiny", "--output", str(tmp_path / "out"), "--push", "me/tiny"])
    check_written(name, tmp_path / "out", capsys.readouterr().out)
    [(pipe, repository, more)] = pushed
    assert repository == "me/tiny" and pipe.transformer.is_quantized
    inspect.signature(hub.push_to_hub).bind(pipe, repository, **more)


@pytest.mark.slow
@each
def test_it_runs_as_a_script(name, tmp_path):
    printed = run_script(sys.executable, EXAMPLES / f"{name}.py", "--tiny", "--output", tmp_path / "out")
    check_written(name, tmp_path / "out", printed)


@pytest.mark.slow
def test_two_processes_make_the_pictures_that_one_makes(tmp_path):
    """By torchrun: `accelerate launch` starts several processes on GPUs, but on CPUs only through MPI."""
    one, two = tmp_path / "one", tmp_path / "two"
    script = [EXAMPLES / "multi_gpu.py", "--tiny", "--output"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run_script(sys.executable, *script, one)
    assert "linears quantized" in run_script(*launch, *script, two)

    parts = [dq.Statistics.load(two / f"statistics-{i}-of-2.safetensors") for i in (0, 1)]
    assert [part.about["calls"] for part in parts] == [3, 3]
    merged, alone = (dq.Statistics.load(folder / "statistics.safetensors") for folder in (two, one))
    assert merged.about["calls"] == alone.about["calls"] == 6
    for name, site in merged.sites.items():
        assert torch.equal(site.minimum, alone.sites[name].minimum)
        assert torch.equal(site.maximum, alone.sites[name].maximum)
    names = sorted(path.name for path in one.glob("*.png"))
    assert names == sorted(path.name for path in two.glob("*.png")) == [f"{i:04}.png" for i in range(8)]
    pictures = [(one / name).read_bytes() for name in names]
    assert pictures == [(two / name).read_bytes() for name in names] and len(set(pictures)) == 8


def run_script(*command: object) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
