# SPDX-License-Identifier: Apache-2.0
"""bf16 attention on a CPU by way of two products about a softmax."""

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


def bound(q, k, v):
    """How far each output may be from exact, [B, H, N, D]: what the module says of logits, then bf16 as everywhere.

    A logit off by e_l changes P_l by P_l (e_l + sum_j P_j e_j), and P and y are rounded to 2^-8 of themselves.
    """
    unit = 2**-8
    q, k, v = (x.double() for x in (q, k, v))
    raw = q @ k.transpose(-1, -2)
    largest = raw.amax(-1, keepdim=True)
    off = unit * ((raw - largest).abs() + unit * largest.abs()) / q.shape[-1] ** 0.5
    p = (raw / q.shape[-1] ** 0.5).softmax(-1)
    p_off = p * (off + (p * off).sum(-1, keepdim=True) + unit)
    return 1.1 * (p_off @ v.abs() + unit * (p @ v).abs()) + 1e-6  # a tenth for second-order terms and fp32 sums


@pytest.mark.parametrize("spread", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("tokens", [64, 256, 2048])
@pytest.mark.parametrize("common", [0, 32, 256])
def test_is_as_exact_as_its_formulas_say(tokens, spread, common):
    """Also where all keys have a common part, which moves the logits of a row alike."""
    q, k, v = operands(1, 2, min(tokens, 256), tokens, 64, spread=spread)
    q, k = q + (4 if common else 0), k + common
    y = sdpa.attention_bf16(q, k, v).double()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert ((y - exact).abs() <= bound(q, k, v)).all()


def test_one_product_would_not_be():
    """The reason for the second; and the check above can fail."""
    q, k, v = operands(1, 2, 256, 256, 64, spread=3.0)
    once = (q @ k.transpose(-1, -2) * 64**-0.5).softmax(-1) @ v
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert not ((once.double() - exact).abs() <= bound(q, k, v)).all()
    torchs = F.scaled_dot_product_attention(q, k, v)
    assert error(sdpa.attention_bf16(q, k, v), q, k, v) < 2 * error(torchs, q, k, v) < error(once, q, k, v)


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
    assert n == 0 or ((y.double() - expected).abs() <= bound(q, k, v)).all()


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


def test_unusual_shapes_are_left_to_torch():
    q, k, v = operands(1, 2, 4, 5, 8)
    assert dot_product_attention(q[0], k[0], v[0]).shape == (2, 4, 8)
    assert dot_product_attention(q.expand(3, -1, -1, -1), k, v).shape == (3, 2, 4, 8)
    assert dot_product_attention(q, k, v[..., :6]).shape == (1, 2, 4, 6)
    assert dot_product_attention(q, k[:, :, :0], v[:, :, :0]).shape == (1, 2, 4, 8)


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
