# SPDX-License-Identifier: Apache-2.0
"""Parts run in order, fail alone, stop with the budget and are skipped when they are measured already."""

import pytest
import torch

from diffusers_dq.benchmark.results import Results
from diffusers_dq.benchmark.session import Part, Session
from diffusers_dq.benchmark.settings import Settings

SETTINGS = Settings(device="cpu", rounds=1)
ROW = {"name": "bf16", "median_ms": 1.0, "quartile_low_ms": 1.0, "quartile_high_ms": 1.0, "rounds": 1, "tops": 1.0}


def part(name, measure=lambda settings, peak: {"rows": [ROW]}, kind="gemm"):
    return Part(kind, name, {"model": "DiT", "m": 1, "n": 1, "k": 1}, measure)


def failing(error):
    def measure(settings, peak):
        raise error

    return measure


def test_a_part_that_fails_is_recorded_and_the_next_runs():
    said = []
    results = Results({})
    Session(SETTINGS, results, said.append).run([part("a", failing(ValueError("no"))), part("b")])
    assert [group.get("failed") for group in results.groups] == ["ValueError: no", None]
    assert any("failed: ValueError: no" in line for line in said)


def test_an_interrupted_run_keeps_what_it_has_measured(tmp_path):
    settings = {"rounds": 1, "scope": "model", "cuda_graphs": False}
    about = dict.fromkeys(("driver", "commit", "dirty")) | {"threads": 1, "versions": {}, "settings": settings}
    about |= dict.fromkeys(("hardware", "device", "date"), "")
    results = Results(about, tmp_path / "r.json")
    with pytest.raises(KeyboardInterrupt):
        Session(SETTINGS, results, str).run([part("a"), part("b", failing(KeyboardInterrupt())), part("c")])
    assert [group["name"] for group in Results.load(results.path).groups] == ["a"]


def test_what_is_measured_already_is_left_out_and_what_failed_is_not():
    results, ran = Results({}), []
    parts = [part(name, lambda settings, peak, name=name: ran.append(name) or {"rows": []}) for name in "ab"]
    results.add({"kind": "gemm", "name": "a", "settings": parts[0].settings, "rows": []})
    results.add({"kind": "gemm", "name": "b", "settings": parts[1].settings, "rows": [], "failed": "so"})
    Session(SETTINGS, results, str).run(parts)
    assert ran == ["b"]


def test_no_part_begins_after_the_budget_and_the_rest_is_named():
    said = []
    results = Results({})
    Session(SETTINGS, results, said.append, budget=-1).run([part("a"), part("b")])
    assert results.groups == []
    assert "gemm a, gemm b" in said[-1]


def test_a_part_is_told_the_peak_and_runs_without_gradients_but_not_in_inference_mode():
    seen = []

    def look(settings, peak):
        seen.append((peak, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return {"rows": []}

    peak = part("square", lambda settings, peak: {"rows": [], "int8_tops": 7.0, "definition": "so"}, kind="peak")
    Session(SETTINGS, Results({}), str).run([part("before", look), peak, part("after", look)])
    assert seen == [(None, False, False), (7.0, False, False)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(device="tpu"), "device must be cpu or cuda, got 'tpu'"),
        (dict(rounds=0), "rounds must be at least 1, got 0"),
        (dict(scope="layer"), "scope must be model or blocks, got 'layer'"),
        (dict(cuda_graphs=True), "CUDA graphs need a CUDA device"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"device": "cpu", **change})
