# SPDX-License-Identifier: Apache-2.0
"""`diffusers-dq demo` on the trained model, with a few steps."""

import json

from PIL import Image
from typer.testing import CliRunner

from diffusers_dq.cli import app
from diffusers_dq.commands import demo

runner = CliRunner()


def test_demo_makes_a_table_and_pictures(tmp_path, monkeypatch):
    monkeypatch.delitem(demo.RECIPES, "quality")  # a minute; tests/test_quality.py has it
    result = runner.invoke(app, ["demo", "--output", str(tmp_path), "--images", "2", "--steps", "10", "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    models = content["models"]
    assert list(models) == ["full precision", "RTN W8A8", "HTG W8A8", "RTN W4A8", "HTG W4A8"]
    for name in ("RTN", "HTG"):
        assert models[f"{name} W8A8"]["psnr_db"] > models[f"{name} W4A8"]["psnr_db"] + 6, "half the error and less"
        assert (
            models[f"{name} W4A8"]["bytes"] < models[f"{name} W8A8"]["bytes"] < models["full precision"]["bytes"] / 4
        )
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", "quality_size.png", "activation_ranges.png"}
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.height > 5 * 128, "a row a model"


def test_without_the_model_it_says_where_it_is_to_be_found(tmp_path):
    result = runner.invoke(app, ["demo", "--model", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
    assert result.exit_code == 1 and "give --model the folder examples/dit-cifar10" in result.stderr
    assert not (tmp_path / "out").exists()
