# SPDX-License-Identifier: Apache-2.0
"""bf16 attention on a CPU by way of two products: as good as torch's own, at any size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from diffusers_dq_kernels import dot_product_attention, sdpa


def operands(b, h, n, keys, d, seed=0, spread=1.0):
    """q, k, v as projections leave them: heads are strided. Logits have a standard deviation of spread^2."""
    torch.manual_seed(seed)
    lengths, factors = (n, keys, keys), (spread, spread, 1.0)
    return tuple(
        torch.randn(b, length, h, d).mul(factor).bfloat16().transpose(1, 2)
        for length, factor in zip(lengths, factors, strict=True)
    )


def error(y, q, k, v):
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0, 4.0])
def test_is_nearly_as_exact_as_torch(spread):
    q, k, v = operands(2, 4, 256, 256, 72, spread=spread)
    ours, theirs = (
        error(sdpa.attention_bf16(q, k, v), q, k, v),
        error(F.scaled_dot_product_attention(q, k, v), q, k, v),
    )
    # what is more, by up to a half: logits below the largest, rounded to 2^-9 of their distance from it
    assert ours <= 1.5 * theirs


def test_one_product_would_not_be():
    """The reason for the second: the check above can fail."""
    q, k, v = operands(2, 4, 256, 256, 72, spread=2.0)
    once = (q @ k.transpose(-1, -2) * 72**-0.5).softmax(-1) @ v
    assert error(once, q, k, v) > 3 * error(F.scaled_dot_product_attention(q, k, v), q, k, v)


def test_large_equal_logits_are_no_loss():
    """Keys with a common part of a hundred times their size move all logits of a row alike."""
    q, k, v = operands(1, 2, 64, 64, 64)
    q, k = q + 4, k + 32  # integers in the direction of a common part: bf16 holds q and k themselves well enough
    assert error(sdpa.attention_bf16(q, k, v), q, k, v) <= 2 * error(F.scaled_dot_product_attention(q, k, v), q, k, v)


@given(
    b=st.integers(1, 3),
    h=st.integers(1, 3),
    n=st.integers(0, 40),
    keys=st.integers(1, 40),
    d=st.integers(1, 40),
    logits=st.sampled_from([1, 50, 1 << 21]),
)
@settings(deadline=None, max_examples=40)
def test_any_size_in_any_parts(b, h, n, keys, d, logits):
    q, k, v = operands(b, h, n, keys, d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "_LOGITS_AT_ONCE", logits)
        y = sdpa.attention_bf16(q, k, v)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert y.shape == q.shape and y.dtype == torch.bfloat16
    # logits of some 5 to 2^-9 of themselves, probabilities and outputs to 2^-9: 2^-6 of the largest value
    assert torch.allclose(y.double(), expected, rtol=0, atol=float(v.abs().max()) / 64)


def test_heads_merge_without_a_copy():
    q, k, v = operands(2, 3, 8, 8, 16)
    assert sdpa.attention_bf16(q, k, v).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("key", "value"),
    [(torch.zeros(1, 2, 4, 9), None), (None, torch.zeros(1, 2, 5, 8)), (torch.zeros(1, 2, 4, 8).half(), None)],
)
def test_refuses_operands_that_do_not_fit(key, value):
    q, k, v = operands(1, 2, 4, 4, 8)
    key, value = (x if x is None or x.dtype == torch.half else x.bfloat16() for x in (key, value))
    with pytest.raises(ValueError, match=r"key: expected|value: expected"):
        sdpa.attention_bf16(q, k if key is None else key, v if value is None else value)


def test_only_where_it_is_quicker(monkeypatch):
    q, k, v = operands(1, 2, 4, 4, 8)
    calls = []
    monkeypatch.setattr(sdpa, "attention_bf16", lambda *x: calls.append(x) or torch.zeros(()))
    for quicker, operand, expected in ((True, q, 1), (False, q, 1), (True, q.float(), 1)):
        monkeypatch.setattr(sdpa, "_products_are_quicker", lambda answer=quicker: answer)
        dot_product_attention(operand, k.to(operand.dtype), v.to(operand.dtype))
        assert len(calls) == expected


def test_opcheck():
    torch.library.opcheck(sdpa.attention_bf16.op, operands(2, 2, 5, 7, 8))
