# SPDX-License-Identifier: Apache-2.0
"""Contestants of one step: none is dropped without a word, and none changes another."""

import pytest
import torch

from diffusers_dq.benchmark.compiling import Compiled, kept_inductor_config, repeated_blocks
from diffusers_dq.benchmark.models import build, case_of, inputs
from diffusers_dq.benchmark.settings import Settings
from diffusers_dq.benchmark.stage import BOTH
from diffusers_dq.benchmark.step import measure_step, step_part
from diffusers_dq.benchmark.variants import VARIANTS, Variant, variants_of

CASE = case_of("dit-256").changed(layers=2, heads=2, head_dim=32, tokens=16, batch=1)
SETTINGS = Settings(device="cpu", rounds=2, backend="eager")


def _raise(error):
    raise error


def broken(name, build):
    return Variant(name, "peer", build)


@pytest.fixture(scope="module")
def group():
    class Breaks(torch.nn.Module):
        def forward(self, **arguments):
            torch._dynamo.graph_break()
            return VARIANTS["bf16"].build(sources[0])(**arguments)

    class NotFinite(torch.nn.Module):
        def forward(self, **arguments):
            return type("Output", (), {"sample": torch.full_like(sources[0].reference, float("nan"))})

    sources = []
    variants = [
        *variants_of(("RTN W8A8 dynamic",)),
        broken("absent", lambda source: _raise(ImportError("not installed"))),
        broken("breaks the graph", lambda source: sources.append(source) or Breaks()),
        broken("not finite", lambda source: NotFinite()),
    ]
    with torch.no_grad():
        return measure_step(CASE, SETTINGS, 2.0, variants, BOTH)


def test_each_contestant_has_a_row_a_mode_with_times_or_a_reason(group):
    rows = {(row["name"], row["mode"]): row for row in group["rows"]}
    assert len(rows) == len(group["rows"]) == 10
    assert rows["absent", "eager"]["failed"] == rows["absent", "compiled"]["failed"] == "ImportError: not installed"
    assert "not finite" in rows["not finite", "eager"]["failed"]
    assert "median_ms" in rows["breaks the graph", "eager"]
    assert "failed" in rows["breaks the graph", "compiled"], "fullgraph is not relaxed"
    assert all(("failed" in row) != ("median_ms" in row) for row in rows.values())


def test_a_row_has_its_spread_ratios_bytes_and_error(group):
    rows = {(row["name"], row["mode"]): row for row in group["rows"]}
    row, base = rows["RTN W8A8 dynamic", "compiled"], rows["bf16", "compiled"]
    assert row["times_bf16_compiled"] == pytest.approx(base["median_ms"] / row["median_ms"])
    assert row["quartile_low_ms"] <= row["median_ms"] <= row["quartile_high_ms"]
    assert row["rounds"] == 2
    assert row["weight_bytes"] < base["weight_bytes"]
    assert 0 < row["relative_error_to_bf16"] < 0.1
    assert rows["bf16", "eager"]["relative_error_to_bf16"] == 0


def test_the_roofline_is_the_linears_at_the_peak(group):
    assert group["roofline_ms"] == pytest.approx(group["gemm_operations"] / 2.0e12 * 1e3)


@pytest.mark.parametrize("scope", ["model", "blocks"])
@torch.no_grad()
def test_a_compiled_model_is_compiled_inside_and_as_before_outside(scope):
    model = build(CASE.changed(layers=4), "cpu")
    arguments = inputs(CASE, "cpu", torch.float32)
    expected = model(**arguments).sample
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = Compiled(model, Settings(device="cpu", scope=scope, backend=backend))
    with compiled.active():
        assert torch.allclose(model(**arguments).sample, expected, atol=1e-5)
    # blocks share their code; the first is given its input in the memory order of the patch embedding
    assert len(graphs) == {"model": 1, "blocks": 2}[scope]
    model(**arguments)
    assert len(graphs) == {"model": 1, "blocks": 2}[scope]
    assert not any("_compiled_call_impl" in module.__dict__ for module in model.modules())


def test_a_model_without_blocks_is_told_so():
    with pytest.raises(ValueError, match="Linear has no list of blocks to compile; use the scope 'model'"):
        repeated_blocks(torch.nn.Linear(1, 1))


def test_inductor_settings_of_one_contestant_do_not_reach_the_next():
    config = torch._inductor.config
    before = config.coordinate_descent_tuning
    with kept_inductor_config():
        config.coordinate_descent_tuning = not before
    assert config.coordinate_descent_tuning == before


def test_bf16_is_always_there_and_an_unknown_name_is_refused():
    assert [variant.name for variant in variants_of(("SDNQ int8",))] == ["bf16", "SDNQ int8"]
    with pytest.raises(ValueError, match="no contestant named GGUF; known: bf16"):
        step_part(CASE, ("GGUF",))


def test_who_takes_part_where():
    names = {v.name for v in VARIANTS.values() if v.takes_part(case_of("flux"), "cuda")}
    assert "fp32" not in names and not any(name.startswith("HTG") for name in names)
    assert {"torchao int8 dynamic", "torchao float8 row", "SDNQ int8", "RTN W4A8 dynamic"} <= names
