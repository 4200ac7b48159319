# SPDX-License-Identifier: Apache-2.0
"""Docstrings of this project as Markdown, for the site: plain paragraphs, and lines of the form "name: meaning".

As an extension of griffe it rewrites what mkdocstrings renders; `to_markdown` alone serves docs/generate.py.
"""

import inspect
import re
from typing import Any

try:
    from griffe import Extension
except ImportError:  # the tables are generated without the docs extra
    Extension = object

_ITEM = re.compile(r"(?P<names>[\w.*]+(?:, [\w.*]+)*): +(?P<text>\S.*)")
_NEXT_ITEM = re.compile(r" {3,}(?=[\w.*]+(?:, [\w.*]+)*: )")
_SENTENCE_ENDS = (".", ";", ")", ":", "")
_OPENINGS = ("Raises ", "Returns ", "Cost: ", "Memory: ")


def to_markdown(text: str) -> str:
    """Items become a list, "Raises" and "Returns" begin paragraphs, indented blocks after a blank line stay code."""
    written: list[str] = []
    ended = True  # whether the line before ends a sentence: only then may a line begin an item
    inside = ""  # "item", "paragraph", "code", or "" after a blank line
    indent = ""  # of code, which after a list belongs to its last item
    for line in inspect.cleandoc(text).splitlines():
        bare = line.strip()
        if not bare:
            inside, ended = "", True
            written.append("")
        elif line.startswith("    ") and inside in ("code", ""):
            if not inside:
                indent = "    " if _in_list(written) else ""
            inside = "code"
            written.append(indent + line)
        elif ended and not line.startswith(" ") and not bare.startswith(_OPENINGS) and _ITEM.fullmatch(bare):
            if inside != "item":
                written.append("")
            written += [_item(part) for part in _NEXT_ITEM.split(bare)]
            inside = "item"
        else:
            if inside == "item" and (line.startswith(" ") or not ended):
                first, *more = _NEXT_ITEM.split(bare)
                written += [f"    {_escaped(first)}", *map(_item, more)]
            else:
                if inside in ("item", "code") or bare.startswith(_OPENINGS):
                    written.append("")
                written.append(_escaped(bare))
                inside = "paragraph"
        ended = bare.endswith(_SENTENCE_ENDS[:-1]) or not bare
    return re.sub(r"\n{3,}", "\n\n", "\n".join(written)).strip()


def _in_list(written: list[str]) -> bool:
    """Whether the last paragraph is a list's."""
    last = [line for line in written if not line.startswith("    ")]
    return next((line.startswith("- ") for line in reversed(last) if line), False)


def _item(text: str) -> str:
    match = _ITEM.fullmatch(text)
    if match is None:
        return f"    {_escaped(text)}"
    names = ", ".join(f"`{name}`" for name in match["names"].split(", "))
    return f"- {names}: {_escaped(match['text'])}"


def _escaped(text: str) -> str:
    """Outside backticks: no HTML, no emphasis, no references by brackets."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\[\]*_])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


class PlainDocstrings(Extension):
    """Every docstring that mkdocstrings is to show."""

    def on_object(self, *, obj: Any, loader: Any, **kwargs: Any) -> None:
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = to_markdown(obj.docstring.value)
