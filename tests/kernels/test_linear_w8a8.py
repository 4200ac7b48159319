# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_dq_kernels import linear_w8a8, linear_w8a8_dynamic, linear_w8a8_static

EveryForm = Callable[..., dict[str, Any]]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

sizes = st.tuples(st.integers(1, 70), st.integers(1, 150), st.integers(1, 70))
groups = st.integers(1, 4)
seeds = st.integers(0, 999)


class Problem(NamedTuple):
    xq: Tensor
    weight: Tensor
    weight_scale: Tensor
    input_scales: Tensor
    zero_points: Tensor
    row_scales: Tensor
    bias: Tensor
    group: Tensor

    def static(self, out_dtype: torch.dtype) -> tuple[Any, ...]:
        weight_sum = self.weight.sum(1, dtype=torch.int32)
        parameters = (self.weight_scale, weight_sum, self.input_scales, self.zero_points, self.bias, self.group)
        return (self.xq, self.weight, *parameters, out_dtype)

    def dynamic(self, out_dtype: torch.dtype) -> tuple[Any, ...]:
        return (self.xq, self.weight, self.weight_scale, self.row_scales, self.bias, self.group, out_dtype)


def problem(*shape: int, n: int, table_groups: int = 3, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    return Problem(
        xq=torch.randint(-128, 128, shape, dtype=torch.int8, generator=g),
        weight=torch.randint(-128, 128, (n, shape[-1]), dtype=torch.int8, generator=g),
        weight_scale=torch.rand(n, generator=g) + 0.1,
        input_scales=torch.rand(table_groups, generator=g) + 0.1,
        zero_points=torch.randint(-128, 128, (table_groups,), dtype=torch.int32, generator=g),
        row_scales=torch.rand(shape[:-1], generator=g) + 0.1,
        bias=torch.randn(table_groups, n, generator=g) * 100,
        group=torch.randint(0, table_groups, (1,), generator=g),
    )


@settings(max_examples=20, deadline=None)
@given(size=sizes, table_groups=groups, seed=seeds)
def test_integers_equal_int64_exactly(
    every_form: EveryForm, size: tuple[int, int, int], table_groups: int, seed: int
) -> None:
    m, k, n = size
    p = problem(m, k, n=n, table_groups=table_groups, seed=seed)
    products = p.xq.long() @ p.weight.long().t()
    corrected = products - p.zero_points[p.group].long() * p.weight.long().sum(1)
    assert torch.equal(linear_w8a8.linear_w8a8_static_reference(*p.static(torch.int32)).long(), corrected)
    assert torch.equal(linear_w8a8.linear_w8a8_dynamic_reference(*p.dynamic(torch.int32)).long(), products)
    static = every_form(linear_w8a8_static, linear_w8a8._linear_w8a8_static_triton, *p.static(torch.int32))
    for form, y in static.items():
        assert y.dtype == torch.int32 and torch.equal(y.long(), corrected), form
    dynamic = every_form(linear_w8a8_dynamic, linear_w8a8._linear_w8a8_dynamic_triton, *p.dynamic(torch.int32))
    for form, y in dynamic.items():
        assert y.dtype == torch.int32 and torch.equal(y.long(), products), form


@settings(max_examples=20, deadline=None)
@given(size=sizes, table_groups=groups, seed=seeds)
def test_epilogue_is_fp32(every_form: EveryForm, size: tuple[int, int, int], table_groups: int, seed: int) -> None:
    m, k, n = size
    p = problem(m, k, n=n, table_groups=table_groups, seed=seed)
    for op, launcher, reference, args in (
        (
            linear_w8a8_static,
            linear_w8a8._linear_w8a8_static_triton,
            linear_w8a8.linear_w8a8_static_reference,
            p.static(torch.float32),
        ),
        (
            linear_w8a8_dynamic,
            linear_w8a8._linear_w8a8_dynamic_triton,
            linear_w8a8.linear_w8a8_dynamic_reference,
            p.dynamic(torch.float32),
        ),
    ):
        exact = reference(*args[:-1], torch.float64)
        # Five roundings of 2^-24 each: to fp32, two scales, the bias, and the result; the sum of the two terms bounds
        # what they act on.
        allowed = 5 * 2**-24 * ((exact - p.bias[p.group].double()).abs() + 2 * p.bias[p.group].abs())
        for form, y in every_form(op, launcher, *args).items():
            assert ((y.double() - exact).abs() <= allowed).all(), form


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_output_dtypes_and_leading_sizes(every_form: EveryForm, out_dtype: torch.dtype) -> None:
    p = problem(2, 3, 20, n=9)
    p = p._replace(weight_scale=p.weight_scale * 1e-3)
    exact = linear_w8a8.linear_w8a8_static_reference(*p.static(torch.float64))
    for y in every_form(linear_w8a8_static, linear_w8a8._linear_w8a8_static_triton, *p.static(out_dtype)).values():
        assert y.shape == (2, 3, 9) and y.dtype == out_dtype and y.is_contiguous()
        # Twice the unit roundoff: the interpreter cuts off bits where a GPU rounds. fp64 outputs carry fp32 values.
        epsilon = max(torch.finfo(out_dtype).eps, 2**-20)
        assert ((y.double() - exact).abs() <= epsilon * (exact.abs() + p.bias[p.group].abs())).all()


@pytest.mark.parametrize("bias_shape", ["none", "[N]", "[1, N]", "[G, N]"])
def test_bias_shapes(every_form: EveryForm, bias_shape: str) -> None:
    p = problem(5, 32, n=7)
    expected = p.bias[int(p.group)] if bias_shape == "[G, N]" else p.bias[0]
    given_bias = {"none": None, "[N]": p.bias[0], "[1, N]": p.bias[:1], "[G, N]": p.bias}[bias_shape]
    args, bare = list(p.static(torch.float32)), list(p.static(torch.float64))
    args[6], bare[6] = given_bias, None
    exact = linear_w8a8.linear_w8a8_static_reference(*bare) + (0 if given_bias is None else expected)
    for y in every_form(linear_w8a8_static, linear_w8a8._linear_w8a8_static_triton, *args).values():
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("m", [0, 1, 17])
@pytest.mark.parametrize("k", [1, 15, 144])
def test_awkward_sizes(every_form: EveryForm, m: int, k: int) -> None:
    p = problem(m, k, n=3)
    expected = linear_w8a8.linear_w8a8_static_reference(*p.static(torch.int32))
    for y in every_form(linear_w8a8_static, linear_w8a8._linear_w8a8_static_triton, *p.static(torch.int32)).values():
        assert y.shape == (m, 3) and torch.equal(y, expected)


def test_extreme_values_do_not_saturate(every_form: EveryForm) -> None:
    for a, b in ((127, 127), (-128, -128), (-128, 127)):
        p = problem(3, 2048, n=16)
        p = p._replace(xq=torch.full_like(p.xq, a), weight=torch.full_like(p.weight, b))
        for y in every_form(
            linear_w8a8_dynamic, linear_w8a8._linear_w8a8_dynamic_triton, *p.dynamic(torch.int32)
        ).values():
            assert (y == 2048 * a * b).all()


@settings(max_examples=20, deadline=None)
@given(m=st.integers(0, 5), k=st.integers(1, 3000), seed=seeds)
def test_the_floating_point_path_of_old_cpus_is_exact(m: int, k: int, seed: int) -> None:
    p = problem(m, k, n=4, seed=seed)
    assert torch.equal(linear_w8a8._float_int_matmul(p.xq, p.weight).long(), p.xq.long() @ p.weight.long().t())


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("poison", [127, -128])
@pytest.mark.parametrize("k", [37, 48])
def test_neighbours_in_memory_are_neither_read_nor_written(every_form: EveryForm, poison: int, k: int) -> None:
    p = problem(5, k, n=7)
    around_x = torch.full((9, 80), poison, dtype=torch.int8)
    around_x[2:7, 16 : 16 + k] = p.xq
    around_weight = torch.full((11, 96), poison, dtype=torch.int8)
    around_weight[2:9, 16 : 16 + k] = p.weight
    before = around_x.clone(), around_weight.clone()
    expected = linear_w8a8.linear_w8a8_static_reference(*p.static(torch.int32))
    p = p._replace(xq=around_x[2:7, 16 : 16 + k], weight=around_weight[2:9, 16 : 16 + k])
    for y in every_form(linear_w8a8_static, linear_w8a8._linear_w8a8_static_triton, *p.static(torch.int32)).values():
        assert torch.equal(y, expected)
    assert torch.equal(around_x, before[0]) and torch.equal(around_weight, before[1])


def test_opcheck() -> None:
    p = problem(2, 3, 20, n=9)
    for out_dtype in (torch.float32, torch.int32):
        torch.library.opcheck(linear_w8a8_static.op, p.static(out_dtype))
        torch.library.opcheck(linear_w8a8_dynamic.op, p.dynamic(out_dtype))


def test_a_new_group_does_not_recompile() -> None:
    p = problem(2, 3, 20, n=9)

    def static(group: Tensor) -> Tensor:
        return linear_w8a8_static(*p._replace(group=group).static(torch.bfloat16)) + 1

    compiled = torch.compile(static, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for g in (1, 2, 0):
            assert torch.equal(compiled(torch.tensor([g])), static(torch.tensor([g])))


def test_dynamic_shapes_compile_once() -> None:
    p = problem(8, 20, n=9)

    def run(xq: Tensor, row_scales: Tensor) -> Tensor:
        return linear_w8a8_dynamic(*p._replace(xq=xq, row_scales=row_scales).dynamic(torch.float32))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(p.xq, p.row_scales)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (3, 5):
            assert torch.equal(compiled(p.xq[:m], p.row_scales[:m]), run(p.xq[:m], p.row_scales[:m]))


@pytest.mark.parametrize("launcher", [linear_w8a8_static, linear_w8a8._linear_w8a8_static_triton])
def test_bad_arguments_say_what_was_given(launcher: Callable[..., Tensor]) -> None:
    p = problem(4, 20, n=9)
    for position, value, message in (
        (0, p.xq.float(), r"xq: expected int8 \[..., K\], got torch.float32 \[4, 20\]"),
        (1, p.weight[:, :19], r"weight: expected int8 \[N, 20\], got int8 \[9, 19\]"),
        (1, p.weight.view(torch.uint8), r"weight: expected int8 \[N, 20\], got uint8 \[9, 20\]"),
        (2, p.weight_scale[:5], r"weight_scale: expected float32 \[9\], got float32 \[5\]"),
        (4, p.input_scales.double(), r"input_scale: expected float32 \[G\], got float64 \[3\]"),
        (6, p.bias[:, :3], r"bias: .* \[G, 9\], got float32 \[3, 3\]"),
        (8, torch.int8, r"out_dtype: .* got torch.int8"),
    ):
        args = list(p.static(torch.float32))
        args[position] = value
        with pytest.raises(ValueError, match=message):
            launcher(*args)
    with pytest.raises(ValueError, match=r"input_scale: expected torch.float32 \[4\], got torch.float32 \[3\]"):
        linear_w8a8_dynamic(*p._replace(row_scales=p.row_scales[:3]).dynamic(torch.float32))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 60, 500, 4096])
@pytest.mark.parametrize("k", [1152, 2240, 100])
def test_every_tile_is_exact_on_the_gpu(m: int, k: int) -> None:
    p = Problem(*(tensor.cuda() for tensor in problem(m, k, n=1000)))
    assert torch.equal(
        linear_w8a8_static(*p.static(torch.int32)), linear_w8a8.linear_w8a8_static_reference(*p.static(torch.int32))
    )


@needs_gpu
@pytest.mark.gpu
def test_one_cuda_graph_serves_all_groups() -> None:
    p = Problem(*(tensor.cuda() for tensor in problem(256, 1152, n=1152)))
    linear_w8a8_static(*p.static(torch.bfloat16))
    graph, args = torch.cuda.CUDAGraph(), p.static(torch.bfloat16)
    with torch.cuda.graph(graph):
        y = linear_w8a8_static(*args)
    for g in range(3):
        p.group.fill_(g)
        graph.replay()
        assert torch.equal(y, linear_w8a8_static(*args))
