# SPDX-License-Identifier: Apache-2.0
"""Integer products with scales for every group of input channels, on both sides (Q-DiT, arXiv 2406.17343).

    acc[m, n] = sum over groups j of input_scale[m, j] weight_scale[n, j] P[m, n, j]
    P[m, n, j] = sum over k in group j of (xq[m, k] - input_zero_point[m, j]) (q[n, k] - weight_zero_point[n, j])

finished as in _epilogue.py. P is an exact integer: q - weight_zero_point is an int8, formed while the weight is
unpacked, and what the input's zero point takes from a sum over k is a product of two integers,
input_zero_point[m, j] weight_sum[n, j], subtracted before anything is scaled. Scales and the sum over groups are fp32.

M rows, N out_features, K in_features, groups of g input channels.
"""
# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._arguments import FLOATS, contiguous, expect, rows_of
from ._epilogue import FINISH_SCHEMA, Epilogue, rows_at, store_output
from ._gemm import Tile, TileTable, check_integer_operands, empty_output, launch
from ._groups import dequantize_groups, group_size, largest_block_k, unit_scale
from ._int_matmul import int_matmul, int_mm_caveat
from ._library import define_op
from ._triton import jit, tl
from .packing import unpack_int4
from .w4a8 import reads_pairs, transposed_tile, unpack_tile

__all__ = ["linear_grouped"]


class _Parameters(NamedTuple):
    """What follows input and weight in the schema; see `linear_grouped_reference`."""

    weight_scale: Tensor
    input_scale: Tensor
    input_zero_point: Tensor | None
    weight_zero_point: Tensor | None
    weight_sum: Tensor | None
    bias: Tensor | None
    group: Tensor
    out_dtype: torch.dtype
    gate: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"

    @property
    def per_token(self) -> bool:
        """The input scale is that of a whole row, and left to the epilogue."""
        return self.input_scale.shape[-1:] == (1,)

    @property
    def epilogue(self) -> Epilogue:
        """What is left to do once groups are summed: their zero points are out, and their scales in."""
        scale, finish = (
            self.input_scale[..., 0] if self.per_token else None,
            (self.gate, self.residual, self.activation),
        )
        return Epilogue(
            unit_scale(self.weight_scale), scale, None, None, self.bias, self.group, self.out_dtype, *finish
        )

    def check(self, xq: Tensor, weight: Tensor) -> int:
        """Returns the group size; ValueError for what a kernel would read out of bounds or misread."""
        packed, lead = weight.dtype == torch.uint8, xq.shape[:-1]
        expect("weight_scale", self.weight_scale, (torch.float32,), (weight.shape[0], "K / g"))
        n, groups = self.weight_scale.shape
        expect("input_scale", self.input_scale, (torch.float32,), (*lead, 1 if self.per_token else groups))
        check_integer_operands(xq, weight, torch.uint8 if packed else torch.int8, self.epilogue)
        group = group_size("weight_scale", self.weight_scale, xq.shape[-1])
        if self.input_zero_point is not None:
            expect("input_zero_point", self.input_zero_point, (torch.int32,), (*lead, groups))
            if self.weight_sum is None:
                raise ValueError(f"weight_sum: expected int32 [{n}, {groups}] beside an input_zero_point, got None")
            expect("weight_sum", self.weight_sum, (torch.int32,), (n, groups))
        if self.weight_zero_point is not None:
            if not packed:
                raise ValueError("weight_zero_point: expected None for int8 weights: q - zero_point must fit in int8")
            expect("weight_zero_point", self.weight_zero_point, (torch.int8,), (n, groups))
        if self.out_dtype not in FLOATS:
            raise ValueError(f"out_dtype: expected a floating-point type, got {self.out_dtype}")
        return group


# Reference


def linear_grouped_reference(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    """residual + gate * activation(X W^T + bias[g]) with X = (xq - input_zero_point) * input_scale, W likewise.

    xq: [..., K] int8.   weight: [N, K] int8, or [N, K / 2] uint8 that hold two int4 a byte.
    parameters: weight_scale [N, K / g] fp32, g a multiple of 32 that divides K.   input_scale: fp32 [..., K / g], or
    [..., 1], one a row.   input_zero_point: [..., K / g] int32 or None.   weight_zero_point: [N, K / g] int8 or None,
    for int4 weights, so that q - weight_zero_point fits in int8.   weight_sum: [N, K / g] int32, sums of
    q - weight_zero_point over each group; beside an input_zero_point only.   bias, group, out_dtype (floating point),
    gate, residual, activation: see `Epilogue`.
    Returns [..., N] of out_dtype.
    """
    p = _Parameters(*parameters)
    w = dequantize_groups(_unpacked(weight), p.weight_zero_point, p.weight_scale, torch.float64)
    zero_point = None if p.input_zero_point is None else rows_of(p.input_zero_point)
    x = dequantize_groups(rows_of(xq), zero_point, rows_of(p.input_scale), torch.float64)
    y = (x @ w.t()).view(*xq.shape[:-1], len(w))
    return p.epilogue._replace(input_scale=None).apply(y)


def _unpacked(weight: Tensor) -> Tensor:
    return unpack_int4(weight) if weight.dtype == torch.uint8 else weight


# CPU

# Of the output, finished at a time. Each group reads and writes it anew, so it stays in the cache of one core
# (1024 x 1152 x 1152, g = 128, 1 core: 6.0 ms at once, 4.7 ms in pieces).
_VALUES_AT_ONCE = 1 << 19


def _linear_grouped_cpu(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    p = _Parameters(*parameters)
    p.check(xq, weight)
    q, rows = _unpacked(weight), rows_of(xq)
    if p.weight_zero_point is not None:
        q = (q.unflatten(1, (p.weight_zero_point.shape[1], -1)) - p.weight_zero_point[:, :, None]).flatten(1)
    groups = p.weight_scale.shape[1]
    of = _CpuGroups(
        rows.chunk(groups, 1),
        q.chunk(groups, 1),
        p.weight_scale.t().contiguous(),
        None if p.per_token else rows_of(p.input_scale),
        None if p.input_zero_point is None else rows_of(p.input_zero_point),
        None if p.weight_sum is None else p.weight_sum.t().contiguous(),
    )
    y = p.epilogue.finish(of.sum, len(rows), len(q), _VALUES_AT_ONCE)
    return y.view(*xq.shape[:-1], len(q))


class _CpuGroups(NamedTuple):
    """xq, q: of each group, [M, g] and [N, g] int8.   What has a row a group is [K / g, N], the rest [M, K / g]."""

    xq: tuple[Tensor, ...]
    q: tuple[Tensor, ...]
    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    weight_sum: Tensor | None

    def sum(self, piece: slice | None) -> Tensor:
        """fp32 [rows of the piece, N]: acc, but for a scale that is that of a whole row."""
        total: Tensor | None = None
        for j, (x, w) in enumerate(zip(self.xq, self.q, strict=True)):
            acc = int_matmul("linear_grouped", rows_at(x, piece), w)
            if self.input_zero_point is not None and self.weight_sum is not None:
                acc.addcmul_(rows_at(self.input_zero_point, piece)[:, j, None], self.weight_sum[j], value=-1)
            scaled = acc.float()
            if self.input_scale is not None:
                scaled *= rows_at(self.input_scale, piece)[:, j, None]
            weight_scale = self.weight_scale[j]
            total = scaled.mul_(weight_scale) if total is None else total.addcmul_(scaled, weight_scale)
        assert total is not None
        return total


# Kernel


class KernelGroups(NamedTuple):
    """The parameters of groups as a kernel takes them: pointers to [M or N, K / g], or None for what is absent."""

    weight_scale: Any
    input_scale: Any
    input_zero_point: Any
    weight_zero_point: Any
    weight_sum: Any


@jit()
def _scaled(acc, m, n, at, groups, of):
    """acc: [BLOCK_N, BLOCK_M] int32, the sum over group `at` of `groups`.   Returns it in fp32, scaled."""
    if of.input_zero_point is not None:
        zero_point = tl.load(of.input_zero_point + m * groups + at)
        acc -= tl.load(of.weight_sum + n * groups + at)[:, None] * zero_point[None, :]
    scaled = acc.to(tl.float32) * tl.load(of.weight_scale + n * groups + at)[:, None]
    if of.input_scale is not None:
        scaled *= tl.load(of.input_scale + m * groups + at)[None, :]
    return scaled


@jit("M")
def _linear_grouped_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    epilogue,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    of,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    GELU: tl.constexpr,
):
    """One program computes a [BLOCK_N, BLOCK_M] tile of y^T. of: a KernelGroups.

    BLOCK_K divides GROUP, which divides K. Of BLOCK_N and BLOCK_M a thread holds few rows and many columns, hence few
    weight scales and many input scales: where those are of groups, tiles are smaller.
    """
    PER_LOAD: tl.constexpr = 4 if PAIRS else 2 if weight_ptr.dtype.element_ty == tl.uint8 else 1
    offs_m, offs_n, x_ptrs, weight_ptrs = transposed_tile(
        x_ptr, weight_ptr, M, N, stride_xm, stride_wn, PER_LOAD, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M
    )
    m = offs_m % M
    n = offs_n % N
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs)
        weight = tl.load(weight_ptrs)
        if of.weight_zero_point is not None:
            zero_point = tl.load(of.weight_zero_point + n * (K // GROUP) + k // GROUP)
            weight = unpack_tile(weight, None, zero_point[:, None])
        elif PER_LOAD > 1:
            weight = unpack_tile(weight, None, None)
        if BLOCK_K == GROUP:
            total += _scaled(tl.dot(weight, x, out_dtype=tl.int32), m, n, k // GROUP, K // GROUP, of)
        else:
            acc = tl.dot(weight, x, acc, out_dtype=tl.int32)
            if (k + BLOCK_K) % GROUP == 0:
                total += _scaled(acc, m, n, k // GROUP, K // GROUP, of)
                acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K // PER_LOAD
    store_output(total, offs_m[None, :], offs_n[:, None], y_ptr, epilogue, M, N, GELU)


# Launchers

_FEW_ROWS = ((16, Tile(16, 64, 128, 4, 4)), (64, Tile(64, 64, 128, 4, 3)))
_AMPERE = (*_FEW_ROWS, (math.inf, Tile(128, 128, 64, 8, 4)))
_AMPERE_INPUT_GROUPS = (*_FEW_ROWS, (math.inf, Tile(128, 64, 64, 8, 4)))
# (12, 0) has the shared memory of (8, 9).
TILES: TileTable = {
    (8, 0): _AMPERE,
    (9, 0): (
        (16, Tile(16, 128, 128, 4, 4)),
        (64, Tile(64, 128, 128, 8, 4)),
        (math.inf, Tile(128, 128, 128, 8, 4)),
    ),
    (12, 0): _AMPERE,
}
TILES_INPUT_GROUPS: TileTable = {
    (8, 0): _AMPERE_INPUT_GROUPS,
    (9, 0): ((16, Tile(16, 128, 128, 4, 4)), (math.inf, Tile(64, 128, 128, 8, 4))),
    (12, 0): _AMPERE_INPUT_GROUPS,
}


# One by one stored values take registers.
TILES_ODD_N: TileTable = {(8, 0): ((math.inf, Tile(64, 64, 64, 4, 2)),)}


def _linear_grouped_triton(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    p = _Parameters(*parameters)
    group = p.check(xq, weight)
    of = KernelGroups(
        p.weight_scale.contiguous(),
        None if p.per_token else p.input_scale.contiguous(),
        contiguous(p.input_zero_point),
        contiguous(p.weight_zero_point),
        None if p.input_zero_point is None else contiguous(p.weight_sum),
    )
    extra = (of, group, weight.dtype == torch.uint8 and reads_pairs(weight))
    tiles = TILES if p.per_token and p.input_zero_point is None else TILES_INPUT_GROUPS
    tiles = TILES_ODD_N if weight.shape[0] % 16 else tiles
    block_k = largest_block_k(group)
    return launch("linear_grouped", _linear_grouped_kernel, tiles, xq, weight, p.epilogue, extra, block_k)


# Registration


def _fake(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    return empty_output(xq, weight, _Parameters(*parameters).out_dtype)


linear_grouped = define_op(
    "linear_grouped(Tensor xq, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor? input_zero_point,"
    " Tensor? weight_zero_point, Tensor? weight_sum, Tensor? bias, Tensor group, ScalarType out_dtype,"
    f" {FINISH_SCHEMA}) -> Tensor",
    linear_grouped_reference,
    fake=_fake,
    cpu=_linear_grouped_cpu,
    triton=_linear_grouped_triton,
    cpu_caveat=int_mm_caveat,
)
