# SPDX-License-Identifier: Apache-2.0
"""Context parallelism: two processes, each with half of the tokens, make of them what one does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import assert_close

import diffusers_dq as dq

# diffusers (0.42) divides by the number of accelerators, which is 0 on a CPU.
PROCESSES = """
import os
import sys

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from safetensors.torch import save_file

import diffusers_dq


def run(model, inputs):
    with torch.no_grad():
        return torch.stack([model(**inputs, timestep=torch.tensor([t]), return_dict=False)[0] for t in (0.95, 0.02)])


def work(rank, folders, target):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{target}.meeting", rank=rank, world_size=2)
    torch.accelerator.device_count = lambda: 2
    seed = torch.Generator().manual_seed(0)
    noise, prompt, pooled = (torch.randn(2, *shape, generator=seed) for shape in ((16, 16), (4, 32), (32,)))
    inputs = dict(hidden_states=noise, encoder_hidden_states=prompt, pooled_projections=pooled)
    inputs |= dict(img_ids=torch.arange(48.0).reshape(16, 3) % 5, txt_ids=torch.zeros(4, 3))
    results = {}
    for folder in folders:
        model = FluxTransformer2DModel.from_pretrained(folder)
        results[f"{folder}:alone"] = run(model, inputs)
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        results[folder] = run(model, inputs)
    if rank == 0:
        save_file(results, target)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, (sys.argv[2:], sys.argv[1]), nprocs=2, start_method="fork")
"""
CONFIGS = {
    "rtn-w8a8": dict(method="rtn"),
    "htg-w8a8": dict(method="htg", groups=2),
    "svdquant-w4a8": dict(method="svdquant", weight_bits=4, low_rank=4, group_size=32),
}


@pytest.fixture(scope="module")
def folders(tiny_flux, tmp_path_factory) -> dict[str, str]:
    """Of a quantized Flux each, by the names of `CONFIGS`."""
    seed = torch.Generator().manual_seed(0)
    prompt, pooled = torch.randn(1, 4, 32, generator=seed), torch.randn(1, 32, generator=seed)
    call = dict(prompt_embeds=prompt, pooled_prompt_embeds=pooled, height=64, width=64, output_type="latent")
    found = {}
    for name, config in CONFIGS.items():
        pipe = tiny_flux()
        pipe.set_progress_bar_config(disable=True)
        dq.quantize(pipe, dq.DQConfig(**config), calls=[call], num_inference_steps=4, progress=False)
        found[name] = str(tmp_path_factory.mktemp(name))
        pipe.transformer.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def results(folders: dict[str, str], tmp_path_factory) -> dict[str, torch.Tensor]:
    folder: Path = tmp_path_factory.mktemp("parallel")
    script, target = folder / "processes.py", folder / "results.safetensors"
    script.write_text(PROCESSES)
    subprocess.run([sys.executable, str(script), str(target), *folders.values()], check=True, timeout=300)
    return load_file(target)


@pytest.mark.slow  # two processes and their collectives, on two cores
@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_make_what_one_makes(folders, results, name):
    """Tokens are rounded each on its own, or by static scales: sums of attention in another order are all there is."""
    parallel, alone = results[folders[name]], results[f"{folders[name]}:alone"]
    assert not torch.equal(alone[0], alone[1])
    assert_close(parallel, alone)
