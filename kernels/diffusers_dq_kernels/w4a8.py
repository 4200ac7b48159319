# SPDX-License-Identifier: Apache-2.0
"""int8 activations times int4 weights, which are unpacked on the way to the same integer product as W8A8.

With a multiplier for each group of input channels the weight has two levels (QServe, arXiv 2405.04532):

    W[n, k] = q[n, k] * weight_multiplier[n, k // g] * weight_scale[n]

of which the first two are multiplied while unpacking and make an int8, and the last is left to the epilogue.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
from torch import Tensor

from ._arguments import contiguous, expect
from ._epilogue import Epilogue, store_output
from ._gemm import check_integer_operands, launch, tile_index
from ._groups import group_size, largest_block_k, multiply_groups
from ._int_matmul import compiles_on_cpu, int_mm_caveat, linear_compiled, linear_cpu
from ._library import define_op
from ._triton import jit, tl
from .packing import unpack_int4
from .w8a8 import INTEGER_SCHEMA, integer_fake, linear_w8a8_reference

__all__ = ["linear_w4a8", "reads_pairs", "transposed_tile", "unpack_tile"]

_EPILOGUE = len(Epilogue._fields)


def linear_w4a8_reference(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    """`linear_w8a8` with packed weights.   weight: [N, K / 2] uint8, the rest as there, then one more parameter.

    weight_multiplier: [N, K / g] int8 in 1 to 16 or None, g a multiple of 32 that divides K; see `pack_two_level`.
    weight_sum is then the sum of the products of weight and multiplier.
    """
    epilogue, multiplier = _split(parameters)
    return linear_w8a8_reference(xq, _unpacked(weight, multiplier), *epilogue)


def _linear_w4a8_cpu(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    epilogue, multiplier = _split(parameters)
    _check(xq, weight, epilogue, multiplier)
    return linear_cpu("linear_w4a8", xq, _unpacked(weight, multiplier), epilogue)


def _linear_w4a8_compiled(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    if not compiles_on_cpu(xq):
        result: Tensor = linear_w4a8.op(xq, weight, *parameters)  # type: ignore[attr-defined]
        return result
    epilogue, multiplier = _split(parameters)
    return linear_compiled(xq, _unpack_weight(weight, multiplier), epilogue)


def _split(parameters: tuple[Any, ...]) -> tuple[Epilogue, Tensor | None]:
    """The dispatcher leaves out parameters that equal their defaults."""
    return Epilogue(*parameters[:_EPILOGUE]), next(iter(parameters[_EPILOGUE:]), None)


def _unpacked(weight: Tensor, multiplier: Tensor | None) -> Tensor:
    q = unpack_int4(weight)
    return q if multiplier is None else multiply_groups(q, multiplier)


def _unpack_weight_fake(weight: Tensor, multiplier: Tensor | None) -> Tensor:
    return weight.new_empty(weight.shape[0], 2 * weight.shape[1], dtype=torch.int8)


# An op, since Inductor would unpack the weight anew for every row of the input.
_unpack_weight = define_op(
    "unpack_weight(Tensor weight, Tensor? multiplier) -> Tensor", _unpacked, fake=_unpack_weight_fake, cpu=_unpacked
)


def _check(xq: Tensor, weight: Tensor, epilogue: Epilogue, multiplier: Tensor | None) -> int | None:
    """Returns the group size."""
    check_integer_operands(xq, weight, torch.uint8, epilogue)
    if multiplier is None:
        return None
    expect("weight_multiplier", multiplier, (torch.int8,), (weight.shape[0], "K / g"))
    return group_size("weight_multiplier", multiplier, xq.shape[-1])


# Kernel


@jit()
def unpack_tile(packed, multiplier, zero_point):
    """[BLOCK_N, BLOCK_K] int8: (q - zero_point) * multiplier, which must fit.

    packed: [BLOCK_N, BLOCK_K / 4] uint16, or [BLOCK_N, BLOCK_K / 2] uint8 where an address may be odd.
    multiplier, zero_point: [BLOCK_N, 1] int8 or None.
    Four values are computed at once in the bytes of a word, from u = q + 8, which is not negative and times 16 still
    fits in a byte: u * multiplier - c, where c is the same in every byte and no borrow passes from one to the next.
    """
    if packed.dtype == tl.uint8:
        pairs = packed.to(tl.int8, bitcast=True)
        q = tl.reshape(tl.join((pairs << 4) >> 4, pairs >> 4), (packed.shape[0], 2 * packed.shape[1]))
        if zero_point is not None:
            q -= zero_point
        if multiplier is not None:
            q *= multiplier
    else:
        word = packed.to(tl.uint32)
        word = (word | (word << 8)) & 0x00FF00FF
        u = ((word | (word << 4)) & 0x0F0F0F0F) ^ 0x08080808
        c = tl.full((packed.shape[0], 1), 8, tl.uint32)
        if zero_point is not None:
            c += zero_point.to(tl.int32).to(tl.uint32, bitcast=True)
        if multiplier is not None:
            u *= multiplier.to(tl.uint32)
            c *= multiplier.to(tl.uint32)
        c = (c & 0xFF) * 0x01010101
        # byte by byte: with the top bit of the minuend set and that of the subtrahend clear, none of them borrows
        difference = (u | 0x80808080) - (c & 0x7F7F7F7F)
        word = difference ^ ((u ^ c ^ 0xFFFFFFFF) & 0x80808080)
        even = tl.join(word.to(tl.int8), (word >> 16).to(tl.int8))
        odd = tl.join((word >> 8).to(tl.int8), (word >> 24).to(tl.int8))
        q = tl.reshape(tl.join(even, odd), (packed.shape[0], 4 * packed.shape[1]))
    return q


@jit()
def transposed_tile(
    x_ptr,
    weight_ptr,
    M,
    N,
    stride_xm,
    stride_wn,
    PER_LOAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Of a program that computes a [BLOCK_N, BLOCK_M] tile of y^T = W x^T: its rows and columns of y, and pointers.

    PER_LOAD: how many weights are loaded at once: 1 int8, 2 int4, or 4 int4 as a uint16.
    Transposed because an unpacked weight stays in registers as the left operand of the tensor cores; as the right
    one it would go through shared memory.
    """
    if PER_LOAD == 4:
        weight_ptr = weight_ptr.to(tl.pointer_type(tl.uint16))
        stride_wn = stride_wn // 2
    pid_m, pid_n = tile_index(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read other rows, which is cheaper than masking them; the store leaves them out.
    x_ptrs = x_ptr + (offs_m % M).to(tl.int64)[None, :] * stride_xm + tl.arange(0, BLOCK_K)[:, None]
    weight_rows = weight_ptr + (offs_n % N).to(tl.int64)[:, None] * stride_wn
    return offs_m, offs_n, x_ptrs, weight_rows + tl.arange(0, BLOCK_K // PER_LOAD)[None, :]


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
    multiplier_ptr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    GELU: tl.constexpr,
):
    """One program computes a [BLOCK_N, BLOCK_M] tile of y^T. multiplier_ptr: [N, K / GROUP] int8 or None."""
    PER_LOAD: tl.constexpr = 4 if PAIRS else 2
    offs_m, offs_n, x_ptrs, weight_ptrs = transposed_tile(
        x_ptr, weight_ptr, M, N, stride_xm, stride_wn, PER_LOAD, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M
    )
    offs_k = tl.arange(0, BLOCK_K)
    offs_load = tl.arange(0, BLOCK_K // PER_LOAD)
    if multiplier_ptr is not None:
        multiplier_ptrs = multiplier_ptr + (offs_n % N) * (K // GROUP)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            packed = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_k[:, None] < K - k, other=0)
            packed = tl.load(weight_ptrs, mask=offs_load[None, :] < (K - k) // PER_LOAD, other=0)
        if multiplier_ptr is not None:
            weight = unpack_tile(packed, tl.load(multiplier_ptrs + k // GROUP)[:, None], None)
        else:
            weight = unpack_tile(packed, None, None)
        acc = tl.dot(weight, x, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K // PER_LOAD
    store_output(acc, offs_m[None, :], offs_n[:, None], y_ptr, epilogue, M, N, GELU)


# Launchers


def _linear_w4a8_triton(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    epilogue, multiplier = _split(parameters)
    group = _check(xq, weight, epilogue, multiplier)
    extra = (contiguous(multiplier), group or 1, reads_pairs(weight))
    block_k = None if group is None else largest_block_k(group)
    return launch("linear_w4a8", _linear_w4a8_kernel, "linear_w4a8", xq, weight, epilogue, extra, block_k)


def reads_pairs(weight: Tensor) -> bool:
    """Whether a kernel may read two bytes of a packed weight at once."""
    starts = (0,) if weight.stride(1) != 1 else (weight.data_ptr(), weight.stride(0))  # launchers copy the former
    return weight.shape[1] % 2 == 0 and all(start % 2 == 0 for start in starts)


# Registration


def _fake(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    return integer_fake(xq, weight, *parameters[:_EPILOGUE])


linear_w4a8 = define_op(
    "linear_w4a8" + INTEGER_SCHEMA.replace(") ->", ", Tensor? weight_multiplier=None) ->"),
    linear_w4a8_reference,
    fake=_fake,
    cpu=_linear_w4a8_cpu,
    triton=_linear_w4a8_triton,
    compiled=_linear_w4a8_compiled,
    cpu_caveat=int_mm_caveat,
)
