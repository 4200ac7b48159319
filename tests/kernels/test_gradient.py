# SPDX-License-Identifier: Apache-2.0
"""Quantized ops have no gradient: the forward runs with grad mode on, and backward says so instead of going wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_dq_kernels import (
    attention_int8,
    gelu_quantize_dynamic,
    gelu_quantize_static,
    linear_grouped,
    linear_w4a8,
    linear_w4a16,
    linear_w8a8,
    linear_w8a16,
    norm_quantize_dynamic,
    norm_quantize_static,
    pack_int4,
    quantize_dynamic,
    quantize_grouped,
    quantize_static,
)

M, N, K = 6, 48, 64
REFUSED = r"diffusers_dq::{} has no gradient: quantized layers are for inference.*torch.no_grad\(\).*dequantize"
generator = torch.Generator().manual_seed(0)
q = torch.randint(-8, 8, (N, K), dtype=torch.int8, generator=generator)
packed, weight_sum, weight_scale = pack_int4(q), q.sum(1, dtype=torch.int32), torch.rand(N, generator=generator)
group_scale = weight_scale[:, None].repeat(1, K // 32)
group, scale, zero_point = torch.tensor([0]), torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32)
rotation = (torch.ones(K, dtype=torch.int8), 16)
norm = ("layer", 1e-6, None, None, None, None, True)
static, dynamic = (weight_scale, scale, zero_point, weight_sum, None, group, torch.float32), (group, None, None, 8)
Call = Callable[[Tensor], Any]


def of_tokens(product: Any, weight: Tensor, integers: Tensor, tokens: Tensor) -> Tensor:
    return product(integers, weight, weight_scale, tokens, None, None, None, group, torch.float32)


def of_groups(x: Tensor) -> Tensor:
    integers, scales, zero_points = quantize_grouped(x, *dynamic, 32, True)
    sums = q.unflatten(1, (-1, 32)).sum(2, dtype=torch.int32)
    return linear_grouped(
        integers, q, group_scale, scales, zero_points, None, sums, None, group, torch.float32, None, None
    )


# By the op that backward meets first. Between x and some of these there are only integers.
CALLS: dict[str, tuple[str, Call]] = {
    "static": ("linear_w8a8", lambda x: linear_w8a8(quantize_static(x, scale, zero_point, *dynamic), q, *static)),
    "static, four bits": (
        "linear_w4a8",
        lambda x: linear_w4a8(quantize_static(x, scale, zero_point, *dynamic, *rotation), packed, *static),
    ),
    "dynamic": ("linear_w8a8", lambda x: of_tokens(linear_w8a8, q, *quantize_dynamic(x, *dynamic))),
    "dynamic, rotated": (
        "linear_w4a8",
        lambda x: of_tokens(linear_w4a8, packed, *quantize_dynamic(x, *dynamic, *rotation)),
    ),
    "groups": ("linear_grouped", of_groups),
    "norm": (
        "linear_w8a8",
        lambda x: linear_w8a8(norm_quantize_static(x, *norm, scale, zero_point, *dynamic)[0], q, *static),
    ),
    "norm, dynamic": (
        "linear_w8a8",
        lambda x: of_tokens(linear_w8a8, q, *norm_quantize_dynamic(x, *norm, *dynamic)[:2]),
    ),
    "norm, kept": ("norm_quantize_dynamic", lambda x: norm_quantize_dynamic(x, *norm, *dynamic)[2]),
    "gelu": ("linear_w8a8", lambda x: linear_w8a8(gelu_quantize_static(x, scale, zero_point, *dynamic), q, *static)),
    "gelu, dynamic": ("linear_w8a8", lambda x: of_tokens(linear_w8a8, q, *gelu_quantize_dynamic(x, *dynamic))),
    "scales": ("quantize_dynamic", lambda x: quantize_dynamic(x, *dynamic)[1]),
    "eight bits alone": ("linear_w8a16", lambda x: linear_w8a16(x, q, weight_scale, None, group)),
    "four bits alone": ("linear_w4a16", lambda x: linear_w4a16(x, packed, weight_scale, None, group)),
    "attention": (
        "attention_int8",
        lambda x: attention_int8(x[None, None], x[None, None], x[None, None], *[scale] * 4, 0.1, 8),
    ),
    "residual": (
        "linear_w8a8",
        lambda x: linear_w8a8(torch.ones(M, K, dtype=torch.int8), q, *static, None, x[:, :N].clone()),
    ),
}
COMPILED = ("static", "dynamic", "dynamic, rotated", "norm", "groups", "eight bits alone", "residual")


def check(forward: Call, plain: Call, op: str) -> None:
    """`forward` in grad mode is what `plain` is without, and its backward an error."""
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = plain(x)
    wanting = x.clone().requires_grad_()
    y = forward(wanting)
    # compiled: a few roundings apart, of numbers below 1000
    torch.testing.assert_close(y.detach(), expected, rtol=0, atol=1e-3)
    with pytest.raises(RuntimeError, match=REFUSED.format(op)):
        (y.sum() + wanting.sum()).backward()
    assert wanting.grad is None
    assert not forward(x).requires_grad
    with torch.no_grad():
        assert not forward(wanting).requires_grad
    with torch.inference_mode():
        assert torch.equal(forward(x), forward(wanting))


@pytest.mark.parametrize("name", CALLS)
def test_backward_is_refused_and_forward_is_not(name: str) -> None:
    op, call = CALLS[name]
    check(call, call, op)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_backward_is_refused_at_run_time(name: str) -> None:
    op, call = CALLS[name]
    torch.compiler.reset()
    check(torch.compile(call, fullgraph=True), call, op)


@pytest.mark.parametrize("rotated", [(), rotation])
def test_integers_that_leave_a_compiled_graph_still_know_their_source(rotated: tuple[Any, ...]) -> None:
    torch.compiler.reset()
    rounding = torch.compile(lambda x: quantize_static(x, scale, zero_point, *dynamic, *rotated), fullgraph=True)
    y = linear_w8a8(rounding(torch.randn(M, K, requires_grad=True)), q, *static)
    with pytest.raises(RuntimeError, match=REFUSED.format("linear_w8a8")):
        y.sum().backward()


def test_the_ops_themselves_refuse_too() -> None:
    x = torch.randn(M, K, requires_grad=True)
    y = torch.ops.diffusers_dq.linear_w8a16(x, q, weight_scale, None, group)
    assert not torch.ops.diffusers_dq.linear_w8a16(x.detach(), q, weight_scale, None, group).requires_grad
    with pytest.raises(RuntimeError, match=REFUSED.format("linear_w8a16")):
        y.sum().backward()


def test_opcheck_with_an_input_that_wants_a_gradient() -> None:
    x = torch.randn(M, K, requires_grad=True)
    for op, args in (
        (quantize_dynamic.op, (x, *dynamic)),
        (linear_w8a16.op, (x, q, weight_scale, None, group)),
    ):
        kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op, args, test_utils=kinds)


def test_an_output_may_be_written_to() -> None:
    """diffusers' blocks add in place, with grad mode on."""
    x = torch.randn(M, K, requires_grad=True)
    y = linear_w8a8(quantize_static(x, scale, zero_point, group, None, None, 8), q, *static)
    y += 1
    y = torch.nn.functional.relu(y, inplace=True)
    with pytest.raises(RuntimeError, match=REFUSED.format("linear_w8a8")):
        y.sum().backward()
