# SPDX-License-Identifier: Apache-2.0
"""The tiles that are tried: block_m, block_n, block_k, num_warps, num_stages.

Those of gemlite's and LightX2V's published tables, and of ours, that neither spill nor pass the architecture's shared
memory when compiled ahead (tests/kernels/compile_ahead.py --candidates).
"""

from .._tiles import Tile
from ._problems import PROBLEMS

__all__ = ["candidates"]

_SMALL = ((16, 128, 128, 4, 4), (32, 128, 128, 4, 4), (64, 64, 128, 4, 4), (64, 128, 128, 4, 4))
_INTEGER: dict[tuple[int, int], tuple[tuple[int, ...], ...]] = {
    (8, 0): (
        *_SMALL,
        (128, 64, 128, 8, 4),
        (128, 128, 64, 4, 4),
        (128, 128, 64, 8, 4),
        (128, 128, 128, 8, 3),
        (128, 256, 64, 8, 3),
        (256, 128, 64, 8, 3),
    ),
    (8, 6): (
        *_SMALL,
        (128, 64, 128, 8, 3),
        (128, 128, 64, 4, 4),
        (128, 128, 64, 8, 4),
        (128, 128, 128, 8, 3),
        (128, 256, 64, 8, 4),
        (256, 128, 64, 8, 4),
    ),
    (9, 0): (
        *_SMALL,
        (64, 256, 128, 4, 4),
        (128, 128, 128, 8, 4),
        (128, 128, 128, 8, 5),
        (128, 256, 128, 8, 3),
        (128, 256, 128, 8, 4),
        (128, 256, 64, 8, 5),
        (256, 128, 128, 8, 3),
        (256, 128, 128, 8, 4),
    ),
    (10, 0): (
        *_SMALL,
        (64, 64, 128, 8, 4),
        (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 3),
        (128, 128, 128, 8, 4),
        (128, 256, 64, 8, 4),
        (256, 128, 64, 8, 4),
    ),
}
_INTEGER[12, 0] = _INTEGER[8, 6]
_WEIGHT_ONLY = (
    (16, 32, 128, 4, 4),
    (16, 64, 64, 4, 5),
    (16, 64, 128, 4, 3),
    (16, 64, 128, 4, 4),
    (16, 128, 128, 4, 3),
    (32, 64, 64, 4, 4),
    (64, 64, 64, 8, 3),
    (64, 128, 32, 4, 3),
    (128, 128, 32, 8, 3),
)
# Accumulators of a thread that leave registers for what follows the product.
_MOST_ACCUMULATORS = {"": 128, "gelu": 128, "residual": 64}
# Found when compiled ahead: a static scale with GELU spills 8 to 24 bytes.
_SPILLS: dict[tuple[tuple[int, int], str], tuple[tuple[int, ...], ...]] = {
    ((9, 0), "linear_w8a8+gelu"): ((64, 256, 128, 4, 4), (128, 256, 128, 8, 3), (128, 256, 128, 8, 4)),
    ((10, 0), "linear_w8a8+gelu"): ((128, 256, 64, 8, 4),),
}


def candidates(name: str, capability: tuple[int, int]) -> list[Tile]:
    """For the op that tables list under `name`, on this compute capability."""
    op, _, finish = name.partition("+")
    known = max((known for known in _INTEGER if known <= capability), default=(8, 0))
    listed = _WEIGHT_ONLY if PROBLEMS[op].weight_only else _INTEGER[known]
    dropped = _SPILLS.get((known, name), ())
    most = _MOST_ACCUMULATORS[finish]
    return [Tile(*tile) for tile in listed if tile[0] * tile[1] <= 32 * tile[3] * most and tile not in dropped]
