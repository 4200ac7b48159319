# SPDX-License-Identifier: Apache-2.0
"""Prompts brought near to the captions that Open-Sora was trained on: lower case, plain words."""

import html
import re

_MARKUP = re.compile(r"</?[a-zA-Z!][^<>]*>")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+")
_SPACE = re.compile(r"\s+")


def clean_caption(text: str) -> str:
    """Without tags, character entities, web addresses and repeated spaces, in lower case. Cleaning twice is the same.

    Our own and shorter than the one used in training, which also rewrites punctuation, file names and numbers.
    """
    before = None
    while before != text:  # an entity may have hidden a tag, and a tag split an address
        before = text
        text = _ADDRESS.sub(" ", _MARKUP.sub(" ", html.unescape(text)))
    return _SPACE.sub(" ", text).strip().lower()
