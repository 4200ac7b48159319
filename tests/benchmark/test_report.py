# SPDX-License-Identifier: Apache-2.0
"""kernels/README.md shows what kernels/benchmarks/results holds, and nothing else."""

import json
from pathlib import Path

import pytest

from diffusers_dq.benchmark import environment
from diffusers_dq.benchmark.plot import save_plot
from diffusers_dq.benchmark.report import BEGIN, END, load_all, section, section_of, write_readme
from diffusers_dq.benchmark.results import Results
from diffusers_dq.benchmark.tables import table
from diffusers_dq.hardware import name_of

CHECKOUT = Path(__file__).parents[2]
SPREAD = {"median_ms": 2.0, "quartile_low_ms": 1.5, "quartile_high_ms": 2.5, "rounds": 3}

PROFILE = {"ms": 2.0, "entries": [{"name": "graph_3_cpp_fused__to_copy_7", "calls": 4.0, "ms": 1.5}]}


def made_up(path: Path) -> Results:
    settings = {"rounds": 3, "scope": "blocks", "cuda_graphs": True}
    about = {"hardware": "Abacus 9", "device": "cuda", "threads": 1, "driver": "1.2", "versions": {"torch": "2"}}
    results = Results(
        {**about, "date": "2026-01-02T03:04:05", "commit": "0123456789abcdef", "dirty": True, "settings": settings},
        path,
    )
    base = {"kind": "baseline", "mode": "compiled", "times_bf16_compiled": 1.0, **SPREAD}
    rows = [
        {"name": "bf16", **base, "weight_bytes": 2_000_000},
        {"name": "HTG W8A8 static", **base, "kind": "ours", "times_bf16_compiled": 1.8, "profile": PROFILE},
        {"name": "SDNQ int8", "mode": "compiled", "kind": "peer", "failed": "RuntimeError: a|b <c>"},
    ]
    sizes = dict(layers=28, heads=16, head_dim=72, frames=1, tokens=1024, batch=16, cfg=True)
    results.add(
        {
            "kind": "step",
            "name": "dit-512",
            "title": "DiT-XL/2 512",
            "settings": sizes,
            "rows": rows,
            "roofline_ms": 1.0,
        }
    )
    shape = {"model": "DiT", "m": 8, "n": 8, "k": 8}
    results.add(
        {"kind": "gemm", "name": "8x8x8", "settings": shape, "rows": [{"name": "bf16", **SPREAD, "tops": 1.0}]}
    )
    results.add({"kind": "gemm", "name": "9x9x9", "settings": shape, "rows": [], "failed": "MemoryError"})
    return results


def test_the_committed_section_is_what_the_generator_makes_of_the_committed_results():
    found, left_out = load_all(CHECKOUT / "kernels" / "benchmarks" / "results")
    assert section_of(CHECKOUT / "kernels" / "README.md") == section(found, left_out), (
        "run: diffusers-dq benchmark report"
    )


def test_the_section_has_the_hardware_every_row_and_every_failure(tmp_path):
    made_up(tmp_path / "abacus.json")
    text = section(*load_all(tmp_path))
    assert text.startswith(BEGIN) and text.endswith(END)
    for part in (
        "### Abacus 9",
        "commit 0123456789ab with changes",
        "CUDA graphs for every contestant",
        "28 layers, width 1152, 1024 tokens, batch 16 with guidance",
        "- SDNQ int8, compiled failed: RuntimeError: a\\|b &lt;c>",
        "failed: MemoryError",
        "The linears alone at the measured int8 peak: 1 ms.",
        "| DiT-XL/2 512 step, HTG W8A8 times compiled bf16",
        "Where the time goes",
        "| `cpp_fused__to_copy_7`    |     4 | 1.5 |    75% |",
    ):
        assert part in text, part


def test_a_file_without_profiles_is_shown_without_them():
    found, left_out = load_all(CHECKOUT / "kernels" / "benchmarks" / "results")
    assert found and not left_out
    for results in found.values():
        for group in results.groups:
            for row in group["rows"]:
                row.pop("profile", None)
    assert "Where the time goes" not in section(found, left_out)


def test_a_file_of_another_format_is_named_not_dropped(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"hardware": "abacus"}))
    text = section(*load_all(tmp_path))
    assert "Nothing yet" in text
    assert "Not shown: [`old.json`](benchmarks/results/old.json), it has format\\_version None" in text


def test_the_rest_of_the_readme_stays(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n\n{BEGIN}\nold\n{END}\n\nbelow\n")
    write_readme(readme, f"{BEGIN}\nnew\n{END}")
    assert readme.read_text() == f"above\n\n{BEGIN}\nnew\n{END}\n\nbelow\n"
    write_readme(readme, section_of(readme))
    assert readme.read_text().count("new") == 1


@pytest.mark.parametrize("content", ["", BEGIN, f"{END}\n{BEGIN}"])
def test_a_readme_without_markers_is_left_alone(tmp_path, content):
    readme = tmp_path / "README.md"
    readme.write_text(content)
    with pytest.raises(ValueError, match=r"must hold the lines .* in this order"):
        write_readme(readme, "anything")
    assert readme.read_text() == content


def test_the_plot_is_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    results = made_up(tmp_path / "r.json")
    for name in ("a.svg", "b.svg"):
        assert save_plot({"r.json": results}, tmp_path / name)
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text()
    assert not save_plot({}, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_columns_of_a_table_are_aligned():
    assert table(["name", "ms"], [["a", "1.25"], ["longer", "2"]]) == (
        "| name   |   ms |\n| ------ | ---: |\n| a      | 1.25 |\n| longer |    2 |"
    )


def test_where_results_go_and_what_they_are_called():
    assert environment.results_folder() == CHECKOUT / "kernels" / "benchmarks" / "results"
    assert environment.slug("AMD EPYC(R) 9B14 (TM)") == "amd-epyc-9b14"
    about = environment.about("cpu")
    assert about["hardware"] == name_of("cpu") and about["threads"] >= 1 and about["versions"]["torch"]
    assert environment.about("cpu", commit="abc")["commit"] == "abc"
