# SPDX-License-Identifier: Apache-2.0
"""The table script, on a tiny model and a few pictures."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import diffusers_dq as dq

EXAMPLES = Path(__file__).parents[2] / "examples"
NETWORK = """
from torch import nn

class Means(nn.Module):
    def forward(self, x):
        x = x / 255
        return {"pooled": x.mean((2, 3)), "spatial": x[:, 0, :3, :3], "logits": x.amax((2, 3))}
"""


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", EXAMPLES / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tables"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load_script()
REAL = script.tables(128)
ROWS = [
    script.Row("RTN", dict(method="rtn")),
    script.Row("HTG", dict(method="htg", search="minmax")),
    script.Row("RTN, GPTQ, of 4 bits only", dict(method="rtn", rounding="gptq"), only=("W4A8",)),
    script.Row("of the future", dict(method="clairvoyant")),
    script.Row("wrong", dict(method="rtn", no_such_option=1)),
]


@pytest.fixture
def arguments(dit_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "tables", lambda group_size: {"main": ("Methods", ROWS)})
    sizes = ["--images", "6", "--steps", "2", "--bits", "W8A8", "W4A8", "--batch", "4", "--calibration", "4"]
    sizes += ["--classes", "20", "--device", "cpu"]
    return ["--model", str(dit_folder), "--output", str(tmp_path / "out"), *sizes]


@pytest.fixture
def judged(arguments, tmp_path):
    (tmp_path / "network.py").write_text(NETWORK)
    np.savez(tmp_path / "real.npz", np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8))
    return [*arguments, "--features", f"{tmp_path / 'network.py'}:Means", "--reference", str(tmp_path / "real.npz")]


def rows_of(output: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("| ")]


def test_a_table_of_rows_that_work_fail_and_are_missing(judged, tmp_path, capsys):
    script.main(judged)
    header, full, *rows = rows_of(capsys.readouterr().out)
    assert header[:4] == ["bits", "method", "transformer MB", "FID"] and full[:2] == ["full", "full precision"]
    assert all(len(row) == len(header) for row in [full, *rows])
    assert [row[0] for row in rows] == ["W8A8"] * 4 + ["W4A8"] * 5
    eight, four = dict((row[1], row) for row in rows[:4]), dict((row[1], row) for row in rows[4:])
    assert eight.keys() == four.keys() - {"RTN, GPTQ, of 4 bits only"}
    assert any(label.startswith("of the future: ValueError") and "clairvoyant" in label for label in eight)
    assert any(label.startswith("wrong: TypeError") and "no_such_option" in label for label in eight)
    for row in (full, *[table[name] for table in (eight, four) for name in ("RTN", "HTG")]):
        assert all(np.isfinite(float(cell)) for cell in row[2:8])
    psnr = header.index("PSNR")
    assert full[psnr] == "" and float(eight["RTN"][psnr]) > float(four["RTN"][psnr])
    content = json.loads((tmp_path / "out" / "tables.json").read_text())
    assert len(content["tables"]["main"]) == 10 and content["options"]["images"] == 6
    sizes = {(cell["bits"], cell["label"]): cell["nbytes"] for cell in content["tables"]["main"]}
    assert sizes["W4A8", "RTN"] < sizes["W8A8", "RTN"] < sizes["", "full precision"]


def test_finished_cells_are_not_made_again_and_failed_ones_are(judged, tmp_path, capsys, monkeypatch):
    script.main(judged)
    first = rows_of(capsys.readouterr().out)
    statistics = list((tmp_path / "out").glob("statistics-*.safetensors"))
    assert len(statistics) == 1, "calibrated once for a number of steps"

    made = []
    monkeypatch.setattr(script, "sample", lambda pipe, *args, **kwargs: made.append(pipe))
    monkeypatch.setattr(dq, "calibrate", lambda *args, **kwargs: pytest.fail("calibrated again"))
    ROWS.append(script.Row("new", dict(method="rtn", dynamic=False)))
    try:
        script.main(judged)
    finally:
        ROWS.pop()
    second = rows_of(capsys.readouterr().out)
    assert [row for row in second if not row[1].startswith("new")] == first
    assert len(made) == 2, "the new row at two bits"
    assert sum(row[1].startswith("new: AttributeError") for row in second) == 2, "its failure is in the table"


def test_without_a_network_only_the_paired_columns_are_filled(arguments, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    script.main([*arguments, "--methods", "rtn", "--bits", "W8A8", "--skip", "WRONG"])
    text = capsys.readouterr().out
    header, full, rtn = rows_of(text)
    assert rtn[header.index("PSNR")] and not any(rtn[header.index(name)] for name in ("FID", "sFID", "IS", "recall"))
    assert "Only paired columns: the Inception network is not to be had here" in text


def test_a_network_that_comes_later_judges_the_pictures_that_are_there(arguments, judged, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    few = ["--methods", "rtn", "--bits", "W8A8", "--skip", "wrong"]
    script.main([*arguments, *few])
    _, *before = rows_of(capsys.readouterr().out)
    monkeypatch.setattr("diffusers_dq.evaluation.sampling._pictures", lambda *args: pytest.fail("it samples again"))
    script.main([*judged, *few])
    header, *after = rows_of(capsys.readouterr().out)
    column = header.index("PSNR")
    assert [row[column] for row in before] == [row[column] for row in after] and after[1][column]
    assert not before[1][3] and np.isfinite(float(after[1][3]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--bits", "4"], "bits are written as W4A8, got '4'"),
        (["--bits", "W5A8"], "weight_bits.*5"),
        (["--methods", "nothing"], "the table 'Methods' has no row that --methods and --skip leave"),
        (["--images", "0"], "images must be at least 1"),
        (["--features", "nothing"], "expected path/to/file.py:function"),
        (["--reference", "/no/such/place"], "holds no pictures"),
        (["--model", "/no/such/place"], "there is no folder"),
    ],
)
def test_options_that_cannot_be_are_one_line(arguments, given, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        script.main([*arguments, *given])


def test_every_row_can_be_configured_and_every_method_has_one():
    configs = [dq.DQConfig(**row.config) for _, rows in REAL.values() for row in rows]
    assert {config.method for config in configs} == set(dq.methods())


@pytest.mark.parametrize(("find", "method"), [("group sizes", "qdit"), ("bits", "viditq")])
def test_a_row_may_be_what_a_search_finds(find, method, arguments, monkeypatch, tmp_path, capsys):
    config = dict(method=method, **(dict(group_size=32) if find == "group sizes" else {}))
    monkeypatch.setattr(
        script, "tables", lambda group_size: {"main": ("Methods", [script.Row("found", config, find=find)])}
    )
    monkeypatch.setattr(script, "GENERATIONS", 1)
    script.main([*arguments, "--bits", "W4A8"])
    assert not any("found:" in row[1] for row in rows_of(capsys.readouterr().out)), "an error would follow the label"
    found = dq.DQConfig.from_json_file(next((tmp_path / "out").glob("*/found.json")))
    assert found.method == method and found.overrides
