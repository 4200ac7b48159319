# SPDX-License-Identifier: Apache-2.0
"""Attention over integers: QK^T and AV of int8 operands with static scales, the softmax between them in fp32.

    S[n, l] = sum_d qq[n, d] qk[l, d]              with qq = round(q / s_q), qk, qv the same, to `bits`
    P[n, l] = softmax_l(S[n, l] s_q s_k softmax_scale)
    a[n, l] = min(round(P[n, l] / s_p), 2^bits - 1)
    y[n, d] = (sum_l a[n, l] qv[l, d]) s_v s_p

The scale of P is static, so P is rounded after its normalisation, which the last key decides: the kernel goes through
the keys twice, or once where all of them fit in registers. B batch, H heads, N queries, L keys, D head width.
"""
# mypy: disable-error-code="no-untyped-def"

import torch
from torch import Tensor

from ._arguments import FLOATS, expect
from ._gemm import Tile, TileTable, capability, pick_tile
from ._library import announce, define_op
from ._triton import jit, tl, triton
from .sdpa import in_parts, output_like

__all__ = ["attention_int8"]

# 2^8 levels times 2^7 values: longer sums would not fit in int32.
_MOST_KEYS = 1 << 16


# Reference


def attention_int8_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    probability_scale: Tensor,
    softmax_scale: float,
    bits: int,
) -> Tensor:
    """softmax(q k^T softmax_scale) v with every operand rounded, the formulas above.

    HTG (arXiv 2503.06930) rounds both products and leaves the softmax in floating point; the code of PTQ4DiT (arXiv
    2405.16005) rounds q, k, v and the probabilities, the latter from zero up. Every scale is static and per tensor.

    query: [B, H, N, D] float.   key, value: [B, H, L, D] float, 1 <= L <= 65536.   the four scales: [1] fp32.
    query, key and value are symmetric, a probability is one of 2^bits levels from zero up.   bits: 2 to 8.
    softmax_scale: greater than zero.
    Returns [B, H, N, D] of query's dtype, stored as [B, N, H, D]: heads merge without a copy.
    """
    q, k, v = (
        _integers(x, scale, bits).double()
        for x, scale in ((query, query_scale), (key, key_scale), (value, value_scale))
    )
    # fp64 holds all these integers exactly, and unlike int64 it has a matmul on every device.
    logits = q @ k.transpose(-1, -2) * (query_scale.double() * key_scale.double() * softmax_scale)
    levels = torch.round(logits.softmax(-1) / probability_scale).clamp(max=2**bits - 1)
    y = levels @ v * (value_scale.double() * probability_scale.double())
    return output_like(query).copy_(y)


def _integers(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Symmetric to `bits`, held as fp32."""
    return (x.float() / scale).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


# CPU, and GPUs where heads are too wide for the kernel: a part of the heads or of the queries at a time

# Logits held at a time: what stays in a core's cache, and never N x L of many heads.
_LOGITS_AT_ONCE = 1 << 20
# fp32 holds every integer up to here, so a sum that stays below is exact in any order.
_EXACT = 1 << 24


def _attention_int8_blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    probability_scale: Tensor,
    softmax_scale: float,
    bits: int,
) -> Tensor:
    _check(query, key, value, (query_scale, key_scale, value_scale, probability_scale), softmax_scale, bits)
    q, k, v = (
        _integers(x, scale, bits).flatten(0, 1)
        for x, scale in ((query, query_scale), (key, key_scale), (value, value_scale))
    )
    logit_scale, output_scale = query_scale * key_scale * softmax_scale, value_scale * probability_scale
    top, largest = 2**bits - 1, 2 ** (bits - 1)
    y = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    for q_part, k_part, v_part, y_part in in_parts(q, k, v, y, _LOGITS_AT_ONCE):
        logits = _exact_matmul(q_part, k_part.transpose(1, 2), largest * largest).mul_(logit_scale)
        levels = logits.softmax(-1).div_(probability_scale).round_().clamp_(max=top)
        torch.mul(_exact_matmul(levels, v_part, top * largest), output_scale, out=y_part)
    return output_like(query).copy_(y.view(query.shape))


def _exact_matmul(a: Tensor, b: Tensor, largest_product: int) -> Tensor:
    """a: [R, N, K], b: [R, K, M], integers held as fp32.   Returns [R, N, M] fp32, the exact sum rounded once."""
    step = _EXACT // largest_product
    if a.shape[2] <= step:
        return a @ b
    parts = zip(a.split(step, 2), b.split(step, 1), strict=True)
    return sum((x @ y).to(torch.int32) for x, y in parts).float()


# Kernels


@jit()
def _round_int8(v, OFFSET: tl.constexpr):
    """int8 of round(v) + OFFSET, half to even; |v| < 2^22 and OFFSET even.

    Adding 1.5 * 2^23 leaves no bit for a fraction, and the integer in the low bits: cheaper than a conversion.
    """
    return (v + (12582912.0 + OFFSET)).to(tl.int32, bitcast=True).to(tl.int8)


@jit()
def _quantize(x, scale, BITS: tl.constexpr):
    """Symmetric to BITS."""
    half: tl.constexpr = 1 << (BITS - 1)
    v = tl.div_rn(x.to(tl.float32), scale)
    return _round_int8(tl.minimum(tl.maximum(v, -half * 1.0), half - 1.0), 0)


@jit()
def _round_probability(v, BITS: tl.constexpr):
    """int8 of a probability in units of its scale, less the 128 that brings 0 to 255 into an int8."""
    return _round_int8(tl.minimum(v, (1 << BITS) - 1.0), -128)


@jit("L", "H")
def _quantize_key_value_kernel(
    k_ptr,
    v_ptr,
    kq_ptr,
    vq_ptr,
    key_scale_ptr,
    value_scale_ptr,
    L,
    PADDED_L,
    H,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program rounds BLOCK_L keys and values of one head.

    kq: [B H, L, PADDED_D], vq: [B H, D, PADDED_L]. The padding, which the attention kernel reads, becomes zero.
    """
    blocks = tl.cdiv(PADDED_L, BLOCK_L)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    offs_l = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    inside = (offs_l < L) & (offs_d < D)
    k = tl.load(k_ptr + b * stride_kb + h * stride_kh + offs_l.to(tl.int64) * stride_kl + offs_d, mask=inside, other=0)
    v = tl.load(v_ptr + b * stride_vb + h * stride_vh + offs_l.to(tl.int64) * stride_vl + offs_d, mask=inside, other=0)
    kq = _quantize(k, tl.load(key_scale_ptr), BITS)
    vq = _quantize(v, tl.load(value_scale_ptr), BITS)
    kq_ptr += head * L * PADDED_D
    vq_ptr += head * D * PADDED_L
    tl.store(kq_ptr + offs_l * PADDED_D + offs_d, kq, mask=(offs_l < L) & (offs_d < PADDED_D))
    tl.store(vq_ptr + offs_d * PADDED_L + offs_l, vq, mask=(offs_l < PADDED_L) & (offs_d < D))


@jit()
def _scores(q, kq_ptr, offs_l, L, PADDED_D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_M, BLOCK_L] fp32: the integers of q k^T, exact. Zero where there is no key."""
    offs_d = tl.arange(0, BLOCK_D)
    inside = (offs_l[None, :] < L) & (offs_d[:, None] < PADDED_D)
    k = tl.load(kq_ptr + offs_l[None, :] * PADDED_D + offs_d[:, None], mask=inside, other=0)
    return tl.dot(q, k, out_dtype=tl.int32).to(tl.float32)


@jit()
def _add_values(acc, levels, vq_ptr, offs_l, PADDED_L, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """acc + levels v. The value of a key that does not exist is zero, whatever its level."""
    offs_d = tl.arange(0, BLOCK_D)
    inside = (offs_l[:, None] < PADDED_L) & (offs_d[None, :] < D)
    v = tl.load(vq_ptr + offs_d[None, :] * PADDED_L + offs_l[:, None], mask=inside, other=0)
    return tl.dot(levels, v, acc, out_dtype=tl.int32)


@jit("N", "L", "H")
def _attention_int8_kernel(
    q_ptr,
    kq_ptr,
    vq_ptr,
    v_sum_ptr,
    y_ptr,
    query_scale_ptr,
    key_scale_ptr,
    value_scale_ptr,
    probability_scale_ptr,
    softmax_scale,
    N,
    L,
    PADDED_L,
    H,
    stride_qb,
    stride_qh,
    stride_qn,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BITS: tl.constexpr,
    EVEN_L: tl.constexpr,
    ONE_PASS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes BLOCK_M rows of one head. y: [B, N, H, D].

    Levels less 128 are multiplied, and 128 times the sum of the values over the keys is added in the end.
    ONE_PASS: BLOCK_L holds all keys, so their logits stay in registers from the softmax to the rounding.
    """
    blocks = tl.cdiv(N, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    offs_m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_l = tl.arange(0, BLOCK_L)
    inside = (offs_m[:, None] < N) & (offs_d[None, :] < D)
    kq_ptr += head * L * PADDED_D
    vq_ptr += head * D * PADDED_L

    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + offs_m.to(tl.int64)[:, None] * stride_qn + offs_d[None, :]
    query_scale = tl.load(query_scale_ptr)
    q = _quantize(tl.load(q_ptrs, mask=inside, other=0.0), query_scale, BITS)
    # In base 2. Greater than zero, so that -inf times it is -inf.
    unit = tl.maximum(query_scale * tl.load(key_scale_ptr) * softmax_scale * 1.4426950408889634, 1e-37)
    probability_scale = tl.load(probability_scale_ptr)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
    if ONE_PASS:
        s = _scores(q, kq_ptr, offs_l, L, PADDED_D, BLOCK_D)
        if not EVEN_L:
            s = tl.where(offs_l[None, :] < L, s, float("-inf"))
        e = tl.exp2(s * unit - (tl.max(s, 1) * unit)[:, None])
        levels = _round_probability(e * (1.0 / (tl.sum(e, 1) * probability_scale))[:, None], BITS)
        acc = _add_values(acc, levels, vq_ptr, offs_l, PADDED_L, D, BLOCK_D)
    else:
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, L, BLOCK_L):
            s = _scores(q, kq_ptr, start + offs_l, L, PADDED_D, BLOCK_D)
            if not EVEN_L:
                s = tl.where(start + offs_l[None, :] < L, s, float("-inf"))
            before = largest
            largest = tl.maximum(before, tl.max(s, 1) * unit)
            total = total * tl.exp2(before - largest) + tl.sum(tl.exp2(s * unit - largest[:, None]), 1)
        # exp2(log2 P - log2 s_p) is P / s_p: one multiply-add and one exp2 for each key.
        shift = largest + tl.log2(total * probability_scale)
        for start in range(0, L, BLOCK_L):
            s = _scores(q, kq_ptr, start + offs_l, L, PADDED_D, BLOCK_D)
            levels = _round_probability(tl.exp2(s * unit - shift[:, None]), BITS)
            acc = _add_values(acc, levels, vq_ptr, start + offs_l, PADDED_L, D, BLOCK_D)

    v_sum = tl.load(v_sum_ptr + head * D + offs_d, mask=offs_d < D, other=0)
    y = (acc + 128 * v_sum[None, :]).to(tl.float32) * (tl.load(value_scale_ptr) * probability_scale)
    y_ptrs = y_ptr + ((b * N + offs_m.to(tl.int64)) * H + h)[:, None] * D + offs_d[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


# Launcher

# By the largest head width: rows, keys, that width. sm_100 multiplies int8 with mma.sync, as sm_80 does.
_MMA_SYNC = ((128, Tile(64, 64, 128, 4, 3)), (256, Tile(64, 64, 256, 8, 2)))
_WGMMA = ((128, Tile(128, 128, 128, 8, 3)), (256, Tile(64, 64, 256, 8, 2)))
# With three stages ptxas stops at 80 registers for heads of 32 on sm_100, and spills 8 bytes.
_MMA_SYNC_SM_100 = ((32, Tile(64, 64, 32, 4, 2)), *_MMA_SYNC)
TILES: TileTable = {(8, 0): _MMA_SYNC, (9, 0): _WGMMA, (10, 0): _MMA_SYNC_SM_100}

# Where one block holds all keys: DiT at 256 x 256 pixels, which has 256, or prompts. At 64 rows, mma.sync spills.
_MMA_SYNC_ONE_PASS = ((128, Tile(32, 256, 128, 4, 1)),)
_WGMMA_ONE_PASS = ((128, Tile(64, 256, 128, 4, 1)),)
ONE_PASS_TILES: TileTable = {(8, 0): _MMA_SYNC_ONE_PASS, (9, 0): _WGMMA_ONE_PASS, (10, 0): _MMA_SYNC_ONE_PASS}
_MOST_KEYS_IN_ONE_PASS = 256
_WIDEST_HEAD_IN_ONE_PASS = 128
_WIDEST_HEAD = 256
_QUANTIZE_KEYS = 64


def _attention_int8_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    probability_scale: Tensor,
    softmax_scale: float,
    bits: int,
) -> Tensor:
    scales = (query_scale, key_scale, value_scale, probability_scale)
    _check(query, key, value, scales, softmax_scale, bits)
    B, H, N, D = query.shape
    L = key.shape[2]
    if D > _WIDEST_HEAD:
        announce("attention_int8", f"no tile for heads wider than {_WIDEST_HEAD}: plain torch, slower")
        return _attention_int8_blockwise(query, key, value, *scales, softmax_scale, bits)
    y = output_like(query)
    if y.numel() == 0:
        return y
    one_pass = L <= _MOST_KEYS_IN_ONE_PASS and D <= _WIDEST_HEAD_IN_ONE_PASS
    tile = pick_tile(ONE_PASS_TILES if one_pass else TILES, capability(query.device), D)
    block_l = max(32, int(triton.next_power_of_2(L))) if one_pass else tile.block_n
    query = _with_unit_stride(query)
    with torch.cuda.device_of(query):
        kq, vq = _quantize_key_value(_with_unit_stride(key), _with_unit_stride(value), key_scale, value_scale, bits)
        _attention_int8_kernel[(triton.cdiv(N, tile.block_m) * B * H,)](
            query,
            kq,
            vq,
            vq.sum(-1, dtype=torch.int32),
            y,
            *scales,
            softmax_scale,
            N,
            L,
            vq.shape[-1],
            H,
            *query.stride()[:3],
            D=D,
            PADDED_D=kq.shape[-1],
            BITS=bits,
            EVEN_L=L % block_l == 0,
            ONE_PASS=one_pass,
            BLOCK_M=tile.block_m,
            BLOCK_L=block_l,
            BLOCK_D=_block_d(D),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y


def _quantize_key_value(
    key: Tensor, value: Tensor, key_scale: Tensor, value_scale: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """key, value: [B, H, L, D] with unit stride along D.   Returns int8 [B, H, L, D + pad] and [B, H, D, L + pad].

    int8 tensor cores read both operands along what they sum over: D for keys, L for values. Rows padded to a multiple
    of 16 are loaded 16 bytes at a time, whatever D and L are.
    """
    B, H, L, D = key.shape
    kq = torch.empty((B, H, L, _round_up(D)), dtype=torch.int8, device=key.device)
    vq = torch.empty((B, H, D, _round_up(L)), dtype=torch.int8, device=key.device)
    _quantize_key_value_kernel[(triton.cdiv(vq.shape[-1], _QUANTIZE_KEYS) * B * H,)](
        key,
        value,
        kq,
        vq,
        key_scale,
        value_scale,
        L,
        vq.shape[-1],
        H,
        *key.stride()[:3],
        *value.stride()[:3],
        D=D,
        PADDED_D=kq.shape[-1],
        BITS=bits,
        BLOCK_L=_QUANTIZE_KEYS,
        BLOCK_D=_block_d(D),
        num_warps=8,
    )
    return kq, vq


def _check(
    query: Tensor, key: Tensor, value: Tensor, scales: tuple[Tensor, ...], softmax_scale: float, bits: int
) -> None:
    expect("query", query, FLOATS, ("B", "H", "N", "D"))
    expect("key", key, FLOATS, (*query.shape[:2], "L", query.shape[3]))
    expect("value", value, FLOATS, tuple(key.shape))
    for name, scale in zip(("query", "key", "value", "probability"), scales, strict=True):
        expect(f"{name}_scale", scale, (torch.float32,), (1,))
    if not 1 <= key.shape[2] <= _MOST_KEYS:
        raise ValueError(f"key: expected 1 to {_MOST_KEYS} keys, got {list(key.shape)}")
    if query.shape[3] == 0:
        raise ValueError(f"query: expected D > 0, got {list(query.shape)}")
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale: expected more than 0, got {softmax_scale}")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: expected 2 to 8, got {bits}")


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _round_up(size: int) -> int:
    return -(-size // 16) * 16


def _block_d(d: int) -> int:
    """The width of blocks: a power of two, of at least the 32 that an int8 product sums at a time."""
    return max(32, int(triton.next_power_of_2(d)))


# Registration


def _attention_int8_fake(query: Tensor, *others: object) -> Tensor:
    return output_like(query)


attention_int8 = define_op(
    "attention_int8(Tensor query, Tensor key, Tensor value, Tensor query_scale, Tensor key_scale, Tensor value_scale,"
    " Tensor probability_scale, float softmax_scale, int bits) -> Tensor",
    attention_int8_reference,
    fake=_attention_int8_fake,
    cpu=_attention_int8_blockwise,
    triton=_attention_int8_triton,
)
