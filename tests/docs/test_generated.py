# SPDX-License-Identifier: Apache-2.0
"""The pages that docs/generate.py writes are those that are committed, and docstrings become what they look like."""

import runpy
import sys
from pathlib import Path
from textwrap import dedent

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generate():
    path = list(sys.path)
    yield runpy.run_path(str(DOCS / "generate.py"), run_name="generate")
    sys.path[:] = path


@pytest.fixture(scope="module")
def to_markdown():
    return runpy.run_path(str(DOCS / "docstrings.py"))["to_markdown"]


@pytest.mark.parametrize("name", ["architectures.md", "devices.md", "figures.md", "methods.md"])
def test_the_committed_page_is_what_the_code_says(name, generate):
    made = generate["PAGES"][name]()
    assert (DOCS / name).read_text() == made, "run: python docs/generate.py"


def test_completion_offers_what_the_commands_take(generate):
    assert generate["LIST"].read_text() == generate["completion_list"](), "run: python docs/generate.py"


def test_all_generated_pages_are_tested(generate):
    marked = {path.name for path in DOCS.rglob("*.md") if generate["GENERATED"] in path.read_text()}
    assert marked == set(generate["PAGES"])


def test_every_public_name_is_in_the_reference():
    import diffusers_dq as dq

    ours = (DOCS / "reference.md").read_text().partition("\n## ")[0]
    shown = [line.rpartition(".")[2] for line in ours.splitlines() if line.startswith("::: ")]
    assert sorted(shown) == sorted(dq.__all__)


def test_every_page_is_in_the_navigation():
    configuration = (DOCS.parent / "mkdocs.yml").read_text()
    for path in DOCS.rglob("*.md"):
        assert f": {path.relative_to(DOCS).as_posix()}\n" in configuration


def test_sections_of_the_readme_that_pages_include_exist():
    hooks = runpy.run_path(str(DOCS / "hooks.py"))
    asked = [heading for path in DOCS.rglob("*.md") for heading in hooks["_SECTION"].findall(path.read_text())]
    assert asked and all(len(hooks["section"](heading)) > 100 for heading in asked)
    with pytest.raises(ValueError, match="no section 'None such'"):
        hooks["section"]("None such")


def test_lines_that_name_something_become_a_list(to_markdown):
    text = """What it does.

    first, second: what they are, on
        two lines.   third: beside it, x[0] < 1.

        y = a_b * c

    Words: not before a sentence ends. See
    that: this goes on.
    Raises ValueError for `a_b`.
    """
    assert to_markdown(text) == dedent(
        """\
        What it does.

        - `first`, `second`: what they are, on
            two lines.
        - `third`: beside it, x\\[0\\] &lt; 1.

                y = a_b * c

        - `Words`: not before a sentence ends. See
            that: this goes on.

        Raises ValueError for `a_b`."""
    )


def test_indented_lines_after_a_blank_one_stay_as_they_are(to_markdown):
    assert to_markdown("It solves\n\n    min_x |a*b|\n    s.t. x > 0\n\nexactly.") == (
        "It solves\n\n    min_x |a*b|\n    s.t. x > 0\n\nexactly."
    )
