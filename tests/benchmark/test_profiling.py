# SPDX-License-Identifier: Apache-2.0
"""A profile says where a step's time goes, by name, and changes nothing that was timed."""

from types import SimpleNamespace

import pytest
import torch
from torch.profiler import record_function

from diffusers_dq.benchmark import step
from diffusers_dq.benchmark.compiling import Compiled, compiled_anew
from diffusers_dq.benchmark.models import case_of
from diffusers_dq.benchmark.profiling import profile_of, summary
from diffusers_dq.benchmark.settings import Settings
from diffusers_dq.benchmark.step import measure_step
from diffusers_dq.benchmark.tables import kernel_name, profile_tables
from diffusers_dq.benchmark.variants import variants_of

CASE = case_of("dit-256").changed(layers=1, heads=2, head_dim=32, tokens=16, batch=1)


def event(key, us, device="CPU", device_us=0.0, count=4, **more):
    kind = SimpleNamespace(name=device)
    return SimpleNamespace(
        key=key, count=count, self_cpu_time_total=us, self_device_time_total=device_us, device_type=kind, **more
    )


def test_the_ten_longest_of_all_a_step():
    events = [event(f"op {i}", 1000.0 * i) for i in range(12)]
    found = summary(events, 2, on_gpu=False)
    assert [entry["name"] for entry in found["entries"]] == [f"op {i}" for i in range(11, 1, -1)]
    assert found["entries"][0] == {"name": "op 11", "calls": 2.0, "ms": 5.5}
    assert found["ms"] == pytest.approx(33.0), "those that have no entry count too"


def test_on_a_gpu_kernels_count_once():
    events = [
        event("aten::mm", 900.0, device_us=80.0),  # the host's part: the same 80 us are the kernel's
        event("gemm_kernel", 0.0, "CUDA", 80.0),
        event("Memcpy DtoD", 0.0, "CUDA", 20.0, is_user_annotation=False),
        event("## Call CompiledFxGraph abc ##", 0.0, "CUDA", 100.0, is_user_annotation=True),
        event("cudaLaunchKernel", 500.0),
    ]
    found = summary(events, 1, on_gpu=True)
    assert [(entry["name"], entry["ms"]) for entry in found["entries"]] == [
        ("gemm_kernel", 0.08),
        ("Memcpy DtoD", 0.02),
    ]
    assert found["ms"] == pytest.approx(0.1)


def test_calls_and_times_are_those_of_one_step():
    def call():
        for _ in range(3):
            with record_function("three times"):
                torch.ones(8).sum()

    found = profile_of(call, "cpu")
    calls = {entry["name"]: entry["calls"] for entry in found["entries"]}
    assert calls["three times"] == calls["aten::sum"] == 3
    assert 0 < sum(entry["ms"] for entry in found["entries"]) <= found["ms"] * (1 + 1e-9)


@pytest.mark.parametrize("scope", ["model", "blocks"])
@torch.no_grad()
def test_a_kernel_of_inductor_shows_up_by_name_although_the_model_was_compiled_before(scope):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Identity()])
            self.blocks[0].forward = lambda x: (x.sin() + 1).cos()

        def forward(self, x):
            return self.blocks[0](x)

    model, settings, x = Model(), Settings(device="cpu", scope=scope), torch.ones(64)
    config = torch._inductor.config

    def run(compiled):
        with compiled.active():
            model(x)

    timed = Compiled(model, settings)
    run(timed)
    with compiled_anew(config.save_config()):
        again = Compiled(model, settings)
        found = profile_of(lambda: run(again), "cpu")
    names = [kernel_name(entry["name"]) for entry in found["entries"]]
    assert any(name.startswith("cpp_fused_") and "sin" in name for name in names), names
    assert not config.cpp.enable_kernel_profile


def test_a_contestant_is_profiled_with_the_inductor_settings_it_was_timed_with():
    config = torch._inductor.config
    before = config.coordinate_descent_tuning
    with config.patch(coordinate_descent_tuning=not before):
        saved = config.save_config()
    with compiled_anew(saved):
        assert config.coordinate_descent_tuning is not before
        assert config.cpp.enable_kernel_profile
    assert config.coordinate_descent_tuning is before


@torch.no_grad()
def test_each_contestant_of_a_step_is_profiled_after_all_were_timed(monkeypatch):
    order = []
    interleave, profile = step.Stage._time, step.profile_of
    monkeypatch.setattr(step.Stage, "_time", lambda stage: (order.append("timed"), interleave(stage)))

    def second_fails(call, device):
        order.append("profiled")
        if order.count("profiled") == 2:
            raise RuntimeError("no profiler")
        return profile(call, device)

    monkeypatch.setattr(step, "profile_of", second_fails)
    settings = Settings(device="cpu", rounds=1, backend="aot_eager", profile=True)
    variants = variants_of(("RTN W8A8 dynamic",))
    group = measure_step(CASE, settings, None, variants, ("eager", "compiled"))
    assert order == ["timed", *["profiled"] * 4]
    first, second, *others = (row["profile"] for row in group["rows"])
    assert second == {"failed": "RuntimeError: no profiler"}
    for found in (first, *others):
        assert 0 < len(found["entries"]) <= 10
    assert "aten::addmm" in {entry["name"] for entry in first["entries"]}
    assert all("median_ms" in row for row in group["rows"]), "a profile that fails leaves the times"


@torch.no_grad()
def test_without_the_option_nothing_is_profiled():
    settings = Settings(device="cpu", rounds=1, backend="eager")
    group = measure_step(CASE, settings, None, variants_of(("bf16",)), ("eager",))
    assert not any("profile" in row for row in group["rows"])
    assert profile_tables(group) == []


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("aten::addmm", "aten::addmm"),
        ("graph_3_cpp_fused__to_copy_add_7", "cpp_fused__to_copy_add_7"),
        ("## Call CompiledFxGraph fphp6xqqowq3ncsjorzwy7wj3lfczum2xrcqngahfnluno3xu5fb ##", "Call CompiledFxGraph"),
        ("graph_12_cpp_fused_" + 9 * "_to_copy_" + "mul_41", "cpp_fused_" + (9 * "_to_copy_")[:39] + "...y_mul_41"),
    ],
)
def test_names_are_short_enough_for_a_table(name, short):
    assert kernel_name(name) == short
    assert len(short) <= 60


def test_the_table_has_shares_and_leaves_out_what_is_small():
    entries = [("a|b", 2, 6.0), ("c", 0.5, 3.9), ("d", 1, 0.05)]
    profile = {"ms": 10.0, "entries": [{"name": name, "calls": calls, "ms": ms} for name, calls, ms in entries]}
    rows = [
        {"name": "bf16", "mode": "eager", "profile": profile},
        {"name": "bf16", "mode": "compiled", "profile": {"failed": "RuntimeError: a_b"}},
        {"name": "SDNQ int8", "mode": "eager", "failed": "so"},
    ]
    heading, shown, failed = profile_tables({"rows": rows})
    assert heading.startswith("Where the time goes")
    assert shown.splitlines() == [
        "| bf16, eager | calls |  ms | of all |",
        "| ----------- | ----: | --: | -----: |",
        "| `a\\|b`      |     2 |   6 |    60% |",
        "| `c`         |   0.5 | 3.9 |    39% |",
        "| all         |       |  10 |   100% |",
    ]
    assert failed == "- bf16, compiled was not profiled: RuntimeError: a\\_b"
