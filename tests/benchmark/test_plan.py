# SPDX-License-Identifier: Apache-2.0
"""What `all` measures: enough for every bar, the bars first."""

import json

import pytest

from diffusers_dq.benchmark.bars import judge_all
from diffusers_dq.benchmark.plan import dry_plan, full_plan
from diffusers_dq.benchmark.results import Results


def groups_of(parts):
    """As if every part had been measured, each contestant in 1 ms."""
    products = ("bf16 compiled", "W8A8 static", "torch._int_mm")
    names = ("bf16", "fp32", "HTG W8A8 static", "HTG W4A8 static", "torchao int8 dynamic")
    gemm = [{"name": name, "median_ms": 1.0} for name in products]
    step = [
        {
            "name": name,
            "mode": mode,
            "kind": "peer" if "torchao" in name else "ours",
            "median_ms": 1.0,
            "weight_bytes": 1,
        }
        for name in names
        for mode in ("eager", "compiled")
    ]
    rows = {"gemm": gemm, "step": step}
    return [
        {"kind": part.kind, "name": part.name, "settings": part.settings, "rows": rows.get(part.kind, [])}
        for part in parts
    ]


@pytest.mark.parametrize(("device", "first"), [("cuda", 10), ("cpu", 2)])
def test_the_first_parts_answer_every_bar_of_the_device(device, first):
    judged = judge_all(Results({"device": device}, groups=groups_of(full_plan(device)[:first])))
    other = "GPU" if device == "cpu" else "CPU"
    unanswered = {entry["note"] for entry in judged if entry["value"] is None}
    assert unanswered == {f"it is for a {other}"}


@pytest.mark.parametrize("parts", [full_plan("cuda"), full_plan("cpu"), dry_plan()], ids=["cuda", "cpu", "dry"])
def test_parts_begin_with_the_peak_and_are_told_apart(parts):
    assert parts[0].kind == "peak"
    keys = [json.dumps([part.kind, part.name, part.settings], sort_keys=True) for part in parts]
    assert len(set(keys)) == len(keys)
    assert {part.kind for part in parts} == {"peak", "gemm", "step", "pipeline"}
