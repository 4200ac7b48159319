# SPDX-License-Identifier: Apache-2.0
"""Rotations that spread the outliers of a few input channels over all: u R, which a weight undoes as W R.

    R = diag(signs) blockdiag(H, ..., H) / sqrt(n)        H: [n, n] of +-1, H = H^T, H H = n I

The order n is 4^k, 2 4^k or 36 2^k, and H the Kronecker product of the matrices of its factors, outermost first:

    H_36 = [[C + I, C - I], [C - I, -C - I]]    C the conference matrix over GF(17): Paley's second construction
    H_2  = [[1, 1], [1, -1]]                    Sylvester
    H_4  = J - 2 I                              J of ones: all rows have the same sum, "regular" (ConvRot, 2512.03673)

A regular H maps what is constant over channels to itself, where Sylvester's H would gather it in one channel. Orders
with a factor of 2 or 36 are not regular: there, random signs prevent it.
"""
# mypy: disable-error-code="no-untyped-def"

import functools

import torch
from torch import Tensor

from ._triton import jit, tl

__all__ = [
    "check_order",
    "hadamard_matrix",
    "paley_channels",
    "rotate",
    "rotate_tile",
    "rotation_order",
    "split_order",
]

_MAX_POWER = 4096
_MAX_PALEY_POWER = 128
_PALEY = 36
_FIELD = 17


def rotation_order(k: int, full_width: bool = False) -> int:
    """The order to rotate k in_features with.

    By default the largest 4^j up to 256 that divides k, or 1 (no rotation) where 4 does not: 64 for 1152, 256 for
    1536, 3072 and 4608. Such a block lies within a warp: a kernel adds numbers between its threads, without memory.
    full_width: k itself, which spreads outliers further: 36 * 32 for 1152, 36 * 128 for 4608. It costs a kernel two
    small products with the matrix of order 18. ValueError where k is no order.
    """
    if full_width:
        check_order(k, k)
        return k
    return max(4**j for j in range(5) if k % 4**j == 0)


def check_order(order: int, k: int) -> None:
    """ValueError unless there is an H of this order and k is a multiple of it."""
    try:
        split_order(order)
    except ValueError as error:
        raise ValueError(f"rotation_order: {error}") from None
    if k % order:
        raise ValueError(
            f"rotation_order: expected a divisor of {k} in_features, got {order}; rotation_order({k}) is"
            f" {rotation_order(k)}"
        )


def split_order(order: int) -> tuple[int, int]:
    """(36 or 1, power of two) whose product is `order`. ValueError if no H of that order is known here."""
    paley = _PALEY if order > 0 and order % _PALEY == 0 else 1
    power = order // paley
    if power < 1 or power & (power - 1) or power > (_MAX_POWER if paley == 1 else _MAX_PALEY_POWER):
        raise ValueError(
            f"expected a power of two up to {_MAX_POWER}, or 36 times one up to {_MAX_PALEY_POWER}, got {order}"
        )
    return paley, power


# Matrices


def hadamard_matrix(order: int) -> Tensor:
    """H: [order, order] fp64, of +-1.   ValueError if no H of that order is known here."""
    h = torch.ones(1, 1, dtype=torch.float64)
    for factor in _factors(order):
        h = torch.kron(_matrix(factor), h)
    return h


def _factors(order: int) -> list[int]:
    """The orders whose Kronecker product H is, innermost first: fours, then at most one two, then at most one 36."""
    paley, power = split_order(order)
    bits = power.bit_length() - 1
    return [4] * (bits // 2) + [2] * (bits % 2) + [36] * (paley == _PALEY)


def _matrix(factor: int) -> Tensor:
    if factor == _PALEY:
        return _paley_matrix()
    h = torch.ones(factor, factor, dtype=torch.float64)
    if factor == 4:
        return h - 2 * torch.eye(4, dtype=torch.float64)
    h[1, 1] = -1
    return h


def _paley_matrix() -> Tensor:
    """H_36 (Paley 1933, second construction): with q = 17, C is symmetric, zero on its diagonal, and C C = 17 I."""
    squares = {x * x % _FIELD for x in range(1, _FIELD)}
    c = torch.ones(_FIELD + 1, _FIELD + 1, dtype=torch.float64)
    for a in range(_FIELD):
        for b in range(_FIELD):
            c[a + 1, b + 1] = 1 if (a - b) % _FIELD in squares else -1
    eye = torch.eye(_FIELD + 1, dtype=torch.float64)
    c *= 1 - eye
    return torch.cat([torch.cat([c + eye, c - eye], 1), torch.cat([c - eye, -c - eye], 1)])


# Plain torch: what the kernel means, and the CPU form


def rotate(u: Tensor, signs: Tensor, order: int, spare: Tensor | None = None) -> Tensor:
    """u R, in the precision of u.

    u: [..., K] float.   signs: [K], +-1.   order: of H, a divisor of K.   Returns [..., K] of u's dtype.
    spare: like u, both contiguous and there to be overwritten: the result is in one of them, and nothing is allocated.
    R is orthogonal: the weight of a linear that is handed u R becomes rotate(W, signs, order), W [N, K].
    """
    shape = u.shape
    signs = signs.to(u.dtype) * order**-0.5
    u = u * signs if spare is None else u.mul_(signs)
    span = 1
    for size, h in _small_matrices(order, u.dtype, u.device):
        v = u.reshape((-1, size) if span == 1 else (-1, size, span))
        factors = (v, h) if span == 1 else (h, v)
        product = torch.matmul(*factors, out=None if spare is None else spare.view(v.shape))
        u, spare = product, None if spare is None else u
        span *= size
    return u.view(shape)


@functools.lru_cache(maxsize=64)
def _small_matrices(order: int, dtype: torch.dtype, device: torch.device) -> list[tuple[int, Tensor]]:
    """The factors of H as (size, matrix), innermost first, multiplied out to sizes that are quick on a CPU.

    2^20 numbers, one core: 0.8 ms as 16 by 16 against 5.1 ms for one matrix of 256, but 64 takes 1.5 ms in one piece
    and 5.1 ms as 16 by 4.
    """
    merged: list[tuple[int, Tensor]] = []
    largest = 64 if split_order(order)[1] <= 64 else 16
    with torch.inference_mode(False):  # these outlive the call
        for factor in _factors(order):
            h = _matrix(factor)
            if factor != _PALEY and merged and merged[-1][0] * factor <= largest:
                size, inner = merged.pop()
                h = torch.kron(h, inner)
            merged.append((len(h), h))
        return [(size, h.to(device, dtype)) for size, h in merged]


# Kernel parts


@jit()
def rotate_tile(u, LOG2: tl.constexpr, PALEY: tl.constexpr):
    """u H: [rows, columns], its elements in the order of channels. The caller multiplies by signs / sqrt(order).

    The order is 2^LOG2, times 36 if PALEY: then u is [1, 64 C], in the order of paley_channels.
    """
    for i in tl.static_range(LOG2 // 2):
        u = _butterfly_4(u, 4**i)
    if LOG2 % 2:
        u = _butterfly_2(u, 2 ** (LOG2 - 1))
    if PALEY:
        u = _paley_36(u)
    return u


@jit()
def paley_channels(offs, K, COLUMNS: tl.constexpr, LOG2: tl.constexpr):
    """(channel, whether it exists) of elements of a tile [32, 2, COLUMNS], of which [18, 2, K / 36] exist.

    Channels are [K / order, 2, 18, 2^LOG2]; the first and the last of these sizes are the columns.
    """
    i = offs // (2 * COLUMNS)
    half = offs // COLUMNS % 2
    column = offs % COLUMNS
    block = column // 2**LOG2
    offs_k = ((block * 2 + half) * 18 + i) * 2**LOG2 + column % 2**LOG2
    return offs_k, (i < 18) & (offs_k < K)


@jit()
def _butterfly_4(u, SPAN: tl.constexpr):
    """H_4 on elements SPAN apart: the sum of the four, less twice each."""
    v = tl.reshape(u, (u.numel // (4 * SPAN), 4, SPAN))
    v = tl.sum(v, axis=1, keep_dims=True) - 2.0 * v
    return tl.reshape(v, u.shape)


@jit()
def _butterfly_2(u, SPAN: tl.constexpr):
    """H_2 on elements SPAN apart: the sum of the two, and that less twice the second."""
    v = tl.reshape(u, (u.numel // (2 * SPAN), 2, SPAN))
    v = tl.sum(v, axis=1, keep_dims=True) - tl.where(tl.arange(0, 2)[None, :, None] == 0, 0.0, 2.0 * v)
    return tl.reshape(v, u.shape)


@jit()
def _paley_36(u):
    """H_36 on the halves a, b of 18 rows each: [C (a + b) + (a - b), C (a - b) - (a + b)]."""
    COLUMNS: tl.constexpr = u.numel // 64
    v = tl.reshape(u, (32, 2, COLUMNS))
    first = tl.arange(0, 2)[None, :, None] == 0
    total = tl.sum(v, axis=1, keep_dims=True)
    through_c = tl.where(first, total, total - 2.0 * v)
    beside_c = tl.where(first, 2.0 * v - total, -total)
    # C is exact in tf32, and two tf32 hold a number up to 2^-22 of it: fp32's precision, almost, in two products.
    operand = tl.reshape(through_c, (32, 2 * COLUMNS))
    large = _to_tf32(operand)
    c = _conference_18()
    product = tl.dot(c, _to_tf32(operand - large), input_precision="tf32")
    product = tl.dot(c, large, product, input_precision="tf32")
    return tl.reshape(product, u.shape) + tl.reshape(beside_c, u.shape)


@jit()
def _to_tf32(v):
    """v rounded to the 10 bits of fraction that a tf32 has."""
    return ((v.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@jit()
def _conference_18():
    """C in the first rows and columns of [32, 32] fp32, zero elsewhere."""
    i = tl.arange(0, 32)[:, None]
    j = tl.arange(0, 32)[None, :]
    # Bit d says whether d is a square modulo 17: 1, 2, 4, 8, 9, 13, 15 and 16 are.
    square = (0x1A316 >> ((i - j + 34) % 17)) & 1
    c = tl.where((i == 0) | (j == 0), 1, 2 * square - 1)
    return tl.where((i == j) | (i >= 18) | (j >= 18), 0, c).to(tl.float32)
