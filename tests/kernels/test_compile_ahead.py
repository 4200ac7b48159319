# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for GPUs that are not here: what the interpreter cannot see, and a GPU would show too late."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

CAPABILITIES = (80, 89, 90, 100)
# What one program may use of shared memory, in bytes (CUDA C++ Programming Guide, table of technical specifications).
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    kernels = str(Path(__file__).parents[2] / "kernels")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (kernels, environment.get("PYTHONPATH"))))
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead.py")), *map(str, CAPABILITIES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_every_gpu(reports: list[dict[str, Any]]) -> None:
    kernels = {"w8a8", "w4a8", "weight_only", "quantize_static", "quantize_dynamic"}
    assert {(r["kernel"], r["capability"]) for r in reports} == {(k, c) for k in kernels for c in CAPABILITIES}


def test_nothing_spills(reports: list[dict[str, Any]]) -> None:
    assert [r for r in reports if r["stack"] or r["local"]] == []


def test_shared_memory_fits(reports: list[dict[str, Any]]) -> None:
    assert [r for r in reports if r["shared"] > SHARED_BYTES[r["capability"]]] == []


def test_hopper_multiplies_with_wgmma(reports: list[dict[str, Any]]) -> None:
    # The tile for ragged sizes is too small for it in W8A8: loads of single bytes decide its time.
    hopper = [r for r in reports if r["capability"] == 90 and "ragged" not in r["variant"]]
    dots = [r for r in hopper if "quantize" not in r["kernel"]]
    assert dots and [r for r in dots if r["wgmma.mma_async"] == 0 or r["mma.sync"]] == []


def test_w8a8_feeds_the_tensor_cores_without_shuffling_bytes(reports: list[dict[str, Any]]) -> None:
    assert [r for r in reports if r["kernel"] == "w8a8" and r["prmt"]] == []
