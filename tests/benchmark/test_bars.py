# SPDX-License-Identifier: Apache-2.0
"""The project's promises, held against figures made up for it."""

import pytest

from diffusers_dq.benchmark.bars import BARS, judge_all, line
from diffusers_dq.benchmark.models import case_of
from diffusers_dq.benchmark.results import Results


def step(case, **ms):
    """ms: "name, mode" -> median."""
    rows = []
    for label, median in ms.items():
        name, mode = label.rsplit(", ", 1)
        peer = name.startswith(("torchao", "SDNQ"))
        rows.append({"name": name, "mode": mode, "kind": "peer" if peer else "ours", "weight_bytes": 100})
        rows[-1] |= {"failed": "no"} if median is None else {"median_ms": median}
    return {"kind": "step", "name": case.name, "settings": case.describe(), "rows": rows}


def gemm(m, name, **ms):
    settings = {"m": m, "n": 1, "k": 1}
    return {
        "kind": "gemm",
        "name": name,
        "settings": settings,
        "rows": [{"name": key, "median_ms": value} for key, value in ms.items()],
    }


def judged(device, *groups):
    return {entry["bar"]: entry for entry in judge_all(Results({"device": device}, groups=list(groups)))}


CPU_CASE = case_of("dit-256").changed(layers=4, batch=2, cfg=False)


def test_nothing_measured_is_said_of_every_bar_and_is_no_success():
    for device in ("cpu", "cuda"):
        entries = judged(device)
        assert len(entries) == len(BARS)
        assert all(entry["met"] is None and entry["value"] is None and entry["note"] for entry in entries.values())
        assert all("not measured" in line(entry) for entry in entries.values())


def test_the_worst_gemm_of_many_rows_counts():
    fast = gemm(4096, "fast", **{"W8A8 static": 1.0, "bf16 compiled": 2.0, "torch._int_mm": 1.0})
    slow = gemm(8192, "slow", **{"W8A8 static": 1.0, "bf16 compiled": 1.2, "torch._int_mm": 0.5})
    few_rows = gemm(32, "few", **{"W8A8 static": 9.0, "bf16 compiled": 1.0, "torch._int_mm": 1.0})
    entries = judged("cuda", fast, slow, few_rows)
    first = entries["int8 GEMM, M >= 4096, times compiled bf16"]
    assert (first["value"], first["met"]) == (pytest.approx(1.2), False)
    assert "slow" in first["note"] and "misses by 25.0%" in first["note"]
    assert entries["int8 GEMM, M >= 4096, of cuBLASLt int8"]["value"] == pytest.approx(0.5)


def test_the_headline_step_and_its_peers():
    ms = {
        "bf16, compiled": 30.0,
        "HTG W8A8 static, compiled": 15.0,
        "HTG W4A8 static, compiled": 16.0,
        "SDNQ int8, compiled": 14.0,
        "torchao int8 dynamic, compiled": 20.0,
        "torchao float8 row, compiled": None,
    }
    group = step(case_of("dit-512"), **ms)
    group["rows"][2]["weight_bytes"] = 31
    entries = judged("cuda", group)
    assert entries["DiT-XL/2 512 step, HTG W8A8 times compiled bf16"]["value"] == 2.0
    peer = entries["DiT-XL/2 512 step, HTG W8A8 times the fastest peer"]
    assert not peer["met"] and "best of 2 is SDNQ int8" in peer["note"]
    assert entries["DiT-XL/2 512 step, speed of W4A8 to W8A8"]["met"]
    size = entries["DiT-XL/2 512, bytes of W4A8 weights to bf16"]
    assert not size["met"] and size["bound"] == "<= 0.3" and "misses by 3.3%" in size["note"]


def test_a_model_that_was_cut_down_proves_nothing():
    group = step(case_of("dit-512").changed(layers=4), **{"bf16, compiled": 3.0, "HTG W8A8 static, compiled": 1.0})
    entry = judged("cuda", group)["DiT-XL/2 512 step, HTG W8A8 times compiled bf16"]
    assert entry["met"] is None and "layers 28" in entry["note"]


def test_the_bars_of_the_cpu():
    ms = {
        "bf16, eager": 130.0,
        "bf16, compiled": 120.0,
        "fp32, eager": 440.0,
        "HTG W8A8 static, eager": 100.0,
        "HTG W8A8 static, compiled": 80.0,
        "torchao int8 dynamic, compiled": None,
    }
    entries = judged("cpu", step(CPU_CASE, **ms))
    values = {name: entry["value"] for name, entry in entries.items() if entry["value"] is not None}
    assert list(values.values()) == pytest.approx([1.5, 5.5, 1.3])
    failed = entries["the same, times torchao int8 dynamic compiled"]
    assert failed["met"] is None and failed["note"] == "torchao int8 dynamic, compiled failed: no"
