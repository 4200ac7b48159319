# SPDX-License-Identifier: Apache-2.0
"""Damage drawn at random, and how many cases of it: 500 quick ones, the same every time; DQ_FUZZ_CASES=10000 draws
others."""

import json
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LINEAR = "transformer_blocks.1.attn1.to_q"  # of the models in `dit_folder`
CASES = int(os.environ.get("DQ_FUZZ_CASES", "500"))
REFUSALS = (ValueError, TypeError, OSError)


def fuzzed(share):
    """Settings of a test that gets a share of the cases, rounded up."""
    return settings(
        max_examples=math.ceil(CASES * share),
        deadline=None,
        database=None,
        derandomize=CASES <= 500,
        suppress_health_check=list(HealthCheck),
    )


NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 4, 7, 16, 32, 64, 255, 10**6, 10**9, 10**12, 2**31, 2**63, -(2**63), 10**30]
)
ATOMS = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.floats(), st.sampled_from(["", "static", "token", "float16", "nn", LINEAR])
)
JSON = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner))
NOTHING = object()


def paths_in(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths_in(item, (*path, key))


@st.composite
def changes(draw, value):
    """(places, values): what to put where, NOTHING to take something away."""
    places = draw(st.lists(st.sampled_from([path for path in paths_in(value) if path]), min_size=1, max_size=2))
    return [(place, draw(JSON | st.just(NOTHING))) for place in places]


def changed(value, edits):
    value = json.loads(json.dumps(value))
    for place, new in edits:
        owner = value
        try:
            for key in place[:-1]:
                owner = owner[key]
            if new is NOTHING:
                del owner[place[-1]]
            else:
                owner[place[-1]] = new
        except (KeyError, IndexError, TypeError):
            continue  # an earlier edit has taken it away
    return value


def refused(error):
    """A refusal says something."""
    assert str(error).strip(), f"an empty {type(error).__name__}"


@contextmanager
def spare_memory(size: int) -> Iterator[None]:
    """The process may map so many bytes more than it has, and no more."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# Files of safetensors


def split(content):
    """(header, data) of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header, data, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


@st.composite
def damaged(draw, content):
    """A file with another header, cut short, longer, or of other bytes."""
    kind = draw(st.sampled_from(["header", "size", "cut", "append", "flip", "flip", "text"]))
    header, data = split(content)
    if kind == "header":
        return joined(changed(header, draw(changes(header))), data)
    if kind == "size":
        return joined(header, data, draw(st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]) | st.integers(0, 10**5)))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    if kind == "append":
        return content + draw(st.binary(min_size=1, max_size=9))
    end = len(content) - len(data) if kind == "text" else len(content)
    places = draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=3))
    flipped = bytearray(content)
    for place in places:
        flipped[place] ^= draw(st.integers(1, 255))
    return bytes(flipped)
