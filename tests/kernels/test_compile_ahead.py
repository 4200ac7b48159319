# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for GPUs that are not here: what the interpreter cannot see, and a GPU would show too late.

By default every tile of the tables with a light and with a heavy epilogue; slow: the tuner's candidates; by hand:
every dtype and epilogue. compile_ahead.py says for which architectures, and why (QUICK, CAPABILITIES).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffusers_dq_kernels import _library, _tiles

pytest.importorskip("triton")

Reports = list[dict[str, Any]]

# About 1500 compilations.
by_hand = pytest.mark.skipif(not os.environ.get("DIFFUSERS_DQ_THOROUGH"), reason="set DIFFUSERS_DQ_THOROUGH=1")
# What one program may use of shared memory, in bytes (CUDA C++ Programming Guide, table of technical specifications).
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# prmt in the PTX of a whole kernel, as measured. Bytes arranged for the tensor cores are hundreds; these take one or
# two values of 8 or 16 bits out of a register, which weight-only products do once a weight.
MOST_PRMT = {
    "linear_w8a8": 0,
    "linear_w4a8": 12,
    "linear_grouped": 12,
    "linear_w8a16": 96,
    "linear_w4a16": 64,
    "attention_int8": 176,
}
MOST_PRMT_ELSEWHERE = 32


def without_interpreter(*arguments: str, **variables: str) -> str:
    """What Python prints where Triton compiles: a process of its own, since Triton decides on import."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = (str(Path(__file__).parent), str(Path(__file__).parents[2] / "kernels"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (*folders, environment.get("PYTHONPATH"))))
    environment.update(variables)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(
    scope="module",
    params=[
        "quick",
        pytest.param("thorough", marks=[pytest.mark.slow, by_hand]),
        pytest.param("candidates", marks=pytest.mark.slow),
    ],
)
def reports(request: pytest.FixtureRequest) -> Reports:
    # pytest's cache: Triton compiles only what has changed since the last run
    cache = request.config.cache
    assert cache is not None
    arguments = [] if request.param == "quick" else [f"--{request.param}"]
    script = str(Path(__file__).with_name("compile_ahead.py"))
    lines = without_interpreter(script, *arguments, TRITON_CACHE_DIR=str(cache.mkdir("triton"))).splitlines()
    return [json.loads(line) for line in lines]


def test_every_launch_compiles(reports: Reports) -> None:
    assert [r for r in reports if "error" in r] == []


def compiled(reports: Reports) -> Reports:
    return [r for r in reports if "error" not in r]


def test_nothing_spills(reports: Reports) -> None:
    assert [r for r in compiled(reports) if r["stack"] or r["local"] or r["registers"] > 255] == []


def test_shared_memory_fits(reports: Reports) -> None:
    assert [r for r in compiled(reports) if r["shared"] > SHARED_BYTES[r["capability"]]] == []


def of_tables(reports: Reports, request: pytest.FixtureRequest) -> Reports:
    """Candidates may be slow: then the tuner does not choose them."""
    if "candidates" in request.node.name:
        pytest.skip("about tiles that are shipped")
    return compiled(reports)


def test_hopper_multiplies_with_wgmma(reports: Reports, request: pytest.FixtureRequest) -> None:
    # The tiles for odd sizes are too small for it: loads of single bytes and values decide their time.
    hopper = [r for r in of_tables(reports, request) if r["capability"] == 90]
    dots = [r for r in hopper if r["op"].startswith("linear") and not re.search("ragged|odd", r["variants"][0])]
    assert dots and [r for r in dots if r["wgmma.mma_async"] == 0 or r["mma.sync"]] == []


def test_bytes_are_not_shuffled_for_the_tensor_cores(reports: Reports, request: pytest.FixtureRequest) -> None:
    most = {r["op"]: MOST_PRMT.get(r["op"], MOST_PRMT_ELSEWHERE) for r in reports}
    assert [r for r in of_tables(reports, request) if r["prmt"] > most[r["op"]]] == []


def test_every_kernel_is_compiled() -> None:
    """A new op with a Triton form needs a function in compile_ahead.py that makes its arguments."""
    cases = without_interpreter("-c", "import json, compile_ahead; print(json.dumps(list(compile_ahead.CASES)))")
    assert {op for op, forms in _library._FORMS.items() if forms.triton} <= set(json.loads(cases))


def test_every_tile_of_the_tables_is_compiled(reports: Reports, request: pytest.FixtureRequest) -> None:
    reports = of_tables(reports, request)
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    done = {(r["capability"], r["op"], tuple(r["constants"].get(n) for n in names)) for r in reports}
    for table in _tiles.shipped_tables():
        capability = 10 * table.architecture[0] + table.architecture[1]
        for name, entries in table.ops.items():
            for entry in entries if capability in {r["capability"] for r in reports} else ():
                assert (capability, name.partition("+")[0], tuple(entry.tile)) in done


def test_what_is_compiled_for_groups_and_architectures(reports: Reports, request: pytest.FixtureRequest) -> None:
    done = of_tables(reports, request)
    with_groups = {
        (r["capability"], r["op"])
        for r in done
        if "groups" in r["variants"][0] and r["constants"].get("scale_ptr", 0) is not None
    }
    capabilities = {r["capability"] for r in done}
    assert with_groups >= {(c, op) for c in capabilities for op in ("linear_w8a16", "linear_w4a16")}
    architectures = {10 * major + minor for (major, minor) in (t.architecture for t in _tiles.shipped_tables())} - {0}
    assert capabilities == architectures if "thorough" in request.node.name else capabilities < architectures


def test_another_m_is_another_compilation_only_for_another_tile() -> None:
    """And where a gate's rows per batch item become a multiple of 16 or 1: Triton looks into tuples on its own."""
    code = """
import compile_ahead, functools, torch
def launches(finish, rows):
    keys = set()
    for m in rows:
        args = functools.partial(compile_ahead.integer_args, "linear_w8a8", m, k=1152, finish=finish)
        with compile_ahead.pretending(90) as noted:
            compile_ahead.Case("linear_w8a8", "", args).run()
        keys |= noted.noted.keys()
    return len(keys)
print(launches("gelu", range(1026, 4096, 38)), launches("residual", range(1026, 4096, 38)))
"""
    assert without_interpreter("-c", code).split() == ["1", "2"]
