# SPDX-License-Identifier: Apache-2.0
"""int8 activations times int4 weights, which are unpacked on the way to the same integer product as W8A8."""
# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any

import torch
from torch import Tensor

from ._epilogue import Epilogue, store_output
from ._gemm import Tile, TileTable, check_integer_operands, launch, tile_index
from ._int_matmul import int_mm_caveat, linear_cpu
from ._library import define_op
from ._triton import jit, tl
from .w8a8 import INTEGER_SCHEMA, integer_fake, linear_w8a8_reference
from .packing import unpack_int4

__all__ = ["linear_w4a8", "unpack_tile"]


def linear_w4a8_reference(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    """`linear_w8a8` with packed weights.   weight: [N, K / 2] uint8, the rest as there."""
    return linear_w8a8_reference(xq, unpack_int4(weight), *parameters)


def _linear_w4a8_cpu(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    epilogue = Epilogue(*parameters)
    check_integer_operands(xq, weight, torch.uint8, epilogue)
    return linear_cpu("linear_w4a8", xq, unpack_int4(weight), epilogue)


# Kernel


@jit()
def unpack_tile(packed):
    """[BLOCK_N, BLOCK_K / 2] uint8 to [BLOCK_N, BLOCK_K] int8. Neighbours in a byte stay neighbours: few prmt."""
    pairs = packed.to(tl.int8, bitcast=True)
    both = tl.join((pairs << 4) >> 4, pairs >> 4)  # [BLOCK_N, BLOCK_K / 2, 2]
    return tl.reshape(both, (packed.shape[0], 2 * packed.shape[1]))


@jit("M")
def _linear_w4a8_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    epilogue,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    GELU: tl.constexpr,
):
    """One program computes a [BLOCK_N, BLOCK_M] tile of y^T = W x^T.

    Transposed because an unpacked weight stays in registers as the left operand of the tensor cores; as the right
    one it would go through shared memory.
    """
    pid_m, pid_n = tile_index(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_byte = tl.arange(0, BLOCK_K // 2)
    # Rows past the end read other rows, which is cheaper than masking them; the store leaves them out.
    x_ptrs = x_ptr + (offs_m % M).to(tl.int64)[None, :] * stride_xm + offs_k[:, None]
    weight_ptrs = weight_ptr + (offs_n % N).to(tl.int64)[:, None] * stride_wn + offs_byte[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            packed = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_k[:, None] < K - k, other=0)
            packed = tl.load(weight_ptrs, mask=offs_byte[None, :] < K // 2 - k // 2, other=0)
        acc = tl.dot(unpack_tile(packed), x, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K // 2
    store_output(acc, offs_m[None, :], offs_n[:, None], y_ptr, epilogue, M, N, GELU)


# Launchers

_SMALL = Tile(16, 128, 128, 4, 4)
TILES: TileTable = {
    (8, 0): ((16, _SMALL), (64, Tile(64, 128, 128, 4, 3)), (math.inf, Tile(128, 128, 64, 8, 4))),
    (9, 0): ((16, _SMALL), (64, Tile(64, 128, 128, 4, 4)), (math.inf, Tile(128, 128, 128, 8, 4))),
}


def _linear_w4a8_triton(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    epilogue = Epilogue(*parameters)
    check_integer_operands(xq, weight, torch.uint8, epilogue)
    return launch("linear_w4a8", _linear_w4a8_kernel, TILES, xq, weight, epilogue)


# Registration

linear_w4a8 = define_op(
    "linear_w4a8" + INTEGER_SCHEMA,
    linear_w4a8_reference,
    fake=integer_fake,
    cpu=_linear_w4a8_cpu,
    triton=_linear_w4a8_triton,
    cpu_caveat=int_mm_caveat,
)
