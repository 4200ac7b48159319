# SPDX-License-Identifier: Apache-2.0
"""The example of a method from outside the package: short, and as good as any to load, save and run."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline

import diffusers_dq as dq
from diffusers_dq.methods import METHODS

SCRIPT = Path(__file__).parents[2] / "examples" / "custom_method.py"


def test_it_is_under_sixty_lines():
    assert len(SCRIPT.read_text().splitlines()) < 60


@torch.no_grad()
def test_it_quantizes_and_its_files_load_without_it(dit_folder, dit_statistics, run_dit, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS, "_entries", dict(METHODS._entries))
        runpy.run_path(str(SCRIPT), run_name="custom_method")
        assert "equalize" in dq.methods()
        pipe = DiTPipeline.from_pretrained(dit_folder)
        full = run_dit(pipe.transformer)
        dq.quantize(pipe, dq.DQConfig("equalize", strength=0.5), statistics=dit_statistics, progress=False)
        output = run_dit(pipe.transformer)
        # 8 bits a token leave less than a percent of white noise; a wrong fold leaves another picture
        assert 0 < (output - full).norm() < 0.05 * full.norm()
        pipe.save_pretrained(tmp_path)
    assert "equalize" not in dq.methods()
    assert torch.equal(run_dit(DiTPipeline.from_pretrained(tmp_path).transformer), output)


@pytest.mark.slow
def test_it_runs_as_a_script():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    assert "equalize, W4A8: PSNR" in done.stdout
