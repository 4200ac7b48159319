# SPDX-License-Identifier: Apache-2.0
"""Every figure of quality, size and speed in README.md and choosing.md is in a committed result (docs/readme.py)."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# of quality, size or time, with the unit behind it
FIGURE = re.compile(r"[\d.,]*\d (?:dB|MB|GB|ms|s|seconds|minutes|CPU seconds)\b")


@pytest.fixture(scope="module")
def readme():
    path = list(sys.path)
    yield runpy.run_path(str(ROOT / "docs" / "readme.py"))
    sys.path[:] = path


def flat(text: str) -> str:
    return " ".join(text.split())


def test_tables_are_those_of_the_results(readme):
    text = (ROOT / "README.md").read_text()
    assert set(readme["_MARKED"].findall(text)) == set(readme["TABLES"])
    assert readme["written"](text) == text, "run: python docs/generate.py"


def test_a_changed_figure_of_a_table_is_noticed(readme):
    text = (ROOT / "README.md").read_text()
    for figure in ("35.56", "63.1"):
        assert figure in text and readme["written"](text.replace(figure, "85.56")) == text


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_sentences_with_figures_are_those_of_the_results(readme, page):
    text = flat((ROOT / page).read_text())
    sentences = readme["SENTENCES"][page]()
    assert len(sentences) > 5
    for sentence in sentences:
        assert sentence in text, f"{page} should say: {sentence}"


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_no_other_figure_is_claimed(readme, page):
    text = flat(readme["_MARKED"].sub("", (ROOT / page).read_text()))
    for sentence in readme["SENTENCES"][page]():
        text = text.replace(sentence, "")
    assert not FIGURE.findall(text), "say them in docs/readme.py, from a file in examples/results"


def test_size_bars_are_those_of_the_quality_tests(readme):
    """README gives them as limits, which tests/test_quality.py holds files to."""
    bars = re.findall(r"\[\(8, (0\.\d+)\), \(4, (0\.\d+)\)\]", (ROOT / "tests" / "test_quality.py").read_text())
    demo, wide = bars
    expected = f"at most {demo[0]} (W8A8) and {demo[1]} (W4A8) of bf16 for the small demo model, and {wide[0]} and"
    assert f"{expected} {wide[1]} for 8 blocks" in flat((ROOT / "README.md").read_text())


def test_results_name_their_software_and_machine(readme):
    """Those made before the processor's name was kept say x86_64, or in words what they ran on."""
    for path in sorted(readme["RESULTS"].glob("*.json")):
        content = readme["results"](path.name)
        if path.name == "tables-w4a8-outliers.json":
            assert "AMD EPYC" in content["about"]
        else:
            assert content["hardware"] and content["versions"]["torch"] and content["date"], path.name
