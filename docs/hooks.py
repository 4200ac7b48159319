# SPDX-License-Identifier: Apache-2.0
"""mkdocs: what pages include, and formulas as MathML, which browsers show without a script.

`{{ README: heading }}` in a page becomes that section of README.md, `<!-- include: path -->` that file of the
repository, so that each is written once.
"""

import html
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
_FILE = re.compile(r"<!-- include: (.+?) -->")
_SECTION = re.compile(r"\{\{ README: (.+?) \}\}")
# What pymdownx.arithmatex leaves: TeX between \\( and \\) in a span, or between \\[ and \\] in a div.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', re.DOTALL)


def section(heading: str) -> str:
    """The text under `## heading`. Raises ValueError where README.md has no such heading."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", README.read_text(), re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"README.md has no section {heading!r}, which a page of docs/ includes")
    return found[1].strip()


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    markdown = _FILE.sub(lambda match: (ROOT / match[1]).read_text().rstrip(), markdown)
    return _SECTION.sub(lambda match: section(match[1]), markdown)


def on_page_content(content: str, **kwargs: Any) -> str:
    return _FORMULA.sub(_mathml, content)


def _mathml(formula: "re.Match[str]") -> str:
    from latex2mathml.converter import convert  # of the docs extra

    return str(convert(html.unescape(formula[2]), display="block" if formula[1] == "div" else "inline"))
