# SPDX-License-Identifier: Apache-2.0
"""What all matrix products share: tiles, the order of programs, the checks of operands, the launcher."""
# mypy: disable-error-code="no-untyped-def"

import functools
from typing import Any

import torch
from torch import Tensor

from ._arguments import expect, rows_of
from ._epilogue import Epilogue
from ._library import announce
from ._tiles import GENERIC, Tile, look_up, table_name
from ._triton import jit, tl, triton

__all__ = [
    "RAGGED",
    "Tile",
    "TileTable",
    "capability",
    "check_integer_operands",
    "check_weight",
    "empty_output",
    "launch",
    "pick_tile",
    "table_of",
    "tile_index",
    "tiles_for",
]


# Compute capability -> (largest M, tile) with M rising. A capability that is not listed takes the next lower one.
# For kernels whose tiles do not depend on N and K; the linears' tables are files, see _tiles.py.
TileTable = dict[tuple[int, int], tuple[tuple[float, Tile], ...]]

# For sizes or strides that are not multiples of 16: loads of single bytes, which make larger tiles spill registers.
RAGGED = Tile(32, 64, 32, 8, 2)

# The largest BLOCK_K of the tables: no tile has a tail in a K that is a multiple of it.
_WHOLE_K = 128

# Programs of GROUP_M row blocks that follow one another read the same columns of the weight from L2.
_GROUP_M = 8


# Checks


def check_integer_operands(xq: Tensor, weight: Tensor, weight_dtype: torch.dtype, epilogue: Epilogue) -> None:
    """ValueError for what a kernel would read out of bounds or misread. uint8 weights hold two int4 a byte."""
    if xq.dtype != torch.int8 or xq.dim() == 0:
        raise ValueError(f"xq: expected int8 [..., K], got {xq.dtype} {list(xq.shape)}")
    check_weight(xq.shape[-1], weight, weight_dtype)
    epilogue.check(xq.shape[:-1], weight.shape[0])


def check_weight(k: int, weight: Tensor, weight_dtype: torch.dtype) -> None:
    """int8 weights are [N, K], uint8 ones hold two values a byte: [N, K / 2]."""
    packed = weight_dtype == torch.uint8
    if packed and k % 2:
        raise ValueError(f"weight: int4 needs an even K, got K = {k}")
    expect("weight", weight, (weight_dtype,), ("N", k // 2 if packed else k))


def empty_output(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Room for [..., N].   x: [..., K].   weight: [N, ...]."""
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype, device=x.device)


# Kernel parts


@jit()
def tile_index(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row block, column block) of this program: GROUP_M row blocks go through the columns together."""
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M
    group_m = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    within = pid % (GROUP_M * blocks_n)
    return first_m + within % group_m, within // group_m


# Launcher


def launch(
    op_name: str,
    kernel: Any,
    tiles: str | TileTable,
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    extra: tuple[Any, ...] = (),
    largest_block_k: int | None = None,
) -> Tensor:
    """Run one of the kernels: they take the same arguments, and some of them `extra` ones.   Returns [..., N].

    tiles: the name of an op in the tables of _tiles.py, or a table by M alone.
    largest_block_k: of a product that has to change something every so many columns.
    """
    rows = rows_of(x)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    M, K = rows.shape
    N = weight.shape[0]
    y = empty_output(x, weight, epilogue.out_dtype)
    if y.numel() == 0:
        return y
    if _is_aligned(rows) and _is_aligned(weight):
        tile = _tile(tiles, rows, weight, epilogue)
        if N % 16:
            announce(op_name, "N is not a multiple of 16: values are stored one by one, slower")
    else:
        announce(op_name, "K or a stride is not a multiple of 16: a small tile that loads single bytes, slower")
        tile = RAGGED
    if largest_block_k is not None:
        tile = tile._replace(block_k=min(tile.block_k, largest_block_k))
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),)](
            rows,
            weight,
            y,
            epilogue.for_kernel(M, N),
            M,
            N,
            K,
            rows.stride(0),
            weight.stride(0),
            *extra,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=_GROUP_M,
            EVEN_K=K % tile.block_k == 0,
            GELU=epilogue.activation == "gelu_tanh",
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y


def _tile(tiles: str | TileTable, x: Tensor, weight: Tensor, epilogue: Epilogue) -> Tile:
    n, (m, k) = len(weight), x.shape
    if not isinstance(tiles, str):
        return pick_tile(tiles, capability(x.device), m)
    # One by one stored values take registers: then the tile of the weakest GPU.
    compute_capability = GENERIC if n % 16 else capability(x.device)
    return look_up(table_of(tiles, k, epilogue), compute_capability, m, n, k)


def table_of(op_name: str, k: int, epilogue: Epilogue) -> str:
    """The `table_name` of a product with this K and epilogue."""
    finish = "gelu" if epilogue.activation == "gelu_tanh" else ""
    if epilogue.gate is not None or epilogue.residual is not None or k % _WHOLE_K:
        finish = "residual"
    return table_name(op_name, epilogue.out_dtype == torch.float32, finish)


def tiles_for(tiles: TileTable, compute_capability: tuple[int, int]) -> tuple[tuple[float, Tile], ...]:
    """The entry of the newest architecture that is not newer than this one, else of the oldest."""
    return tiles[max((known for known in tiles if known <= compute_capability), default=min(tiles))]


def pick_tile(tiles: TileTable, compute_capability: tuple[int, int], m: int) -> Tile:
    """A look-up and not an autotuner: nothing runs twice, and a CUDA graph may capture the first call."""
    return next(tile for largest, tile in tiles_for(tiles, compute_capability) if m <= largest)


def _is_aligned(matrix: Tensor) -> bool:
    return all(size % 16 == 0 for size in (matrix.shape[1], matrix.stride(0), matrix.data_ptr()))


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the lowest of all for the interpreter, which runs any tile."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
