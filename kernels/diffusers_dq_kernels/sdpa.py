# SPDX-License-Identifier: Apache-2.0
"""Attention in bf16 on a CPU, where torch's own takes twice as long as the products in it.

torch's flash kernel (2.13) multiplies blocks of 64 queries one after the other, and without AMX each is a call of
oneDNN whose setting up costs more than its product. Here a product takes as many heads as fit in cache. bf16 logits
would be too coarse, 2^-8 of their size, so they are computed twice:

    m[n] = max_l bf16(q[n] k[l]^T)
    P[n] = softmax_l(bf16((q[n] k[l]^T - m[n]) / sqrt(D)))

The difference is taken in the accumulator, before anything is rounded, so a logit x is off by at most
2^-8 |x - m| / sqrt(D), and the ones that count are near zero: the largest is within 2^-8 |m| of m. One more column of
q holds m, and of k -1. B batch, H heads, N queries, L keys, D head width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ._arguments import expect
from ._library import define_op

__all__ = ["dot_product_attention", "in_parts", "output_like"]

# Logits held at a time, 2 MB; buffers of 4 MB are paged in anew at some calls. 2 x 16 heads of 256 tokens and width 72
# take 2.6 ms on 2 cores, 3.9 ms with buffers of 4 MB, torch's kernel 3.9 ms.
_LOGITS_AT_ONCE = 1 << 20
_SPARE = 8  # columns: one is used, and rows stay aligned


def dot_product_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: `F.scaled_dot_product_attention`, or on CPUs where that is quicker `attention_bf16`.

    query: [B, H, N, D] float.   key: [B, H, L, D], value: [B, H, L, E], of the same dtype.   Returns [B, H, N, E].
    """
    plain = query.ndim == 4 and value.shape == key.shape and key.shape[:2] == query.shape[:2] and key.shape[2] > 0
    two_products = query.dtype == torch.bfloat16 and query.device.type == "cpu" and _products_are_quicker()
    if plain and two_products:
        return attention_bf16(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _products_are_quicker() -> bool:
    """Where bf16 products have instructions of their own, but not the tiles for which torch's kernel is built."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def in_parts(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, logits: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Parts of attention of about that many logits each: some heads, or some queries of one.

    query, out: [heads, N, D].   key, value: [heads, L, D].   Yields the same four, out to be written to.
    """
    n, keys = query.shape[1], key.shape[1]
    heads = max(1, logits // max(1, n * keys))
    rows = max(1, logits // max(1, keys))
    for q, k, v, y in zip(*(x.split(heads) for x in (query, key, value, out)), strict=True):
        for q_rows, y_rows in zip(q.split(rows, 1), y.split(rows, 1), strict=True):
            yield q_rows, k, v, y_rows


def attention_bf16_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, every other form with logits rounded as the formulas above.

    query: [B, H, N, D] bf16.   key, value: [B, H, L, D] bf16, L > 0.
    Returns [B, H, N, D] bf16, stored as [B, N, H, D]: heads merge without a copy.
    """
    y = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    return output_like(query).copy_(y)


def _attention_bf16_cpu(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    b, h, _, d = query.shape
    expect("query", query, (torch.bfloat16,), (b, h, query.shape[2], d))
    for name, operand in (("key", key), ("value", value)):
        expect(name, operand, (torch.bfloat16,), (b, h, key.shape[2], d))
    q, k, v = _widened(query, 0), _widened(key, -1), value.flatten(0, 1)
    y = query.new_empty(q.shape[0], q.shape[1], d)
    for q_part, k_part, v_part, y_part in in_parts(q, k, v, y, _LOGITS_AT_ONCE):
        torch.bmm(_logits(q_part, k_part, d).softmax(-1), v_part, out=y_part)
    return output_like(query).copy_(y.view(query.shape))


def _widened(x: Tensor, column: float) -> Tensor:
    """[B, H, N, D] -> [B H, N, D + 8], contiguous, `column` after the last one and then zeros."""
    b, h, n, d = x.shape
    wide = x.new_zeros(b, h, n, d + _SPARE)
    wide[..., :d] = x
    wide[..., d] = column
    return wide.flatten(0, 1)


def _logits(query: Tensor, key: Tensor, d: int) -> Tensor:
    """query: [heads, N, D + 8], whose column D is written; key: [heads, L, D + 8], both widened.

    Returns [heads, N, L] bf16, each row less about its largest.
    """
    keys = key.transpose(1, 2)
    query[..., d] = torch.bmm(query[..., :d], keys[:, :d]).amax(-1)
    logits = query.new_empty(len(query), query.shape[1], key.shape[1])
    return torch.baddbmm(logits, query, keys, beta=0, alpha=d**-0.5, out=logits)


def output_like(query: Tensor) -> Tensor:
    """Uninitialised [B, H, N, D], stored as [B, N, H, D]."""
    b, h, n, d = query.shape
    return torch.empty((b, n, h, d), dtype=query.dtype, device=query.device).transpose(1, 2)


def _attention_bf16_fake(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return output_like(query)


attention_bf16 = define_op(
    "attention_bf16(Tensor query, Tensor key, Tensor value) -> Tensor",
    attention_bf16_reference,
    fake=_attention_bf16_fake,
    cpu=_attention_bf16_cpu,
)
