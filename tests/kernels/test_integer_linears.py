# SPDX-License-Identifier: Apache-2.0
"""linear_w8a8 and linear_w4a8: the same product and the same epilogue, over weights of one or two values a byte."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_dq_kernels import _epilogue, _int_matmul, announce, linear_w4a8, linear_w8a8, pack_int4, w4a8, w8a8

EveryForm = Callable[..., dict[str, Any]]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BITS = (8, 4)
OPS = {8: linear_w8a8, 4: linear_w4a8}
LAUNCHERS = {8: w8a8._linear_w8a8_triton, 4: w4a8._linear_w4a8_triton}
REFERENCES = {8: w8a8.linear_w8a8_reference, 4: w4a8.linear_w4a8_reference}
FINISHES = ("plain", "gelu", "gate and residual", "all")

sizes = st.tuples(st.integers(1, 70), st.integers(1, 75), st.integers(1, 70))
groups = st.integers(1, 4)
seeds = st.integers(0, 999)


@dataclass(frozen=True)
class Problem:
    bits: int
    xq: Tensor
    q: Tensor
    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    zero_point: Tensor | None
    bias: Tensor | None
    group: Tensor
    out_dtype: torch.dtype = torch.float32
    gate: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"

    @property
    def args(self) -> tuple[Any, ...]:
        weight_sum = None if self.zero_point is None else self.q.sum(1, dtype=torch.int32)
        return (
            self.xq,
            self.weight,
            self.weight_scale,
            self.input_scale,
            self.zero_point,
            weight_sum,
            self.bias,
            self.group,
            self.out_dtype,
            self.gate,
            self.residual,
            self.activation,
        )

    def forms(self, every_form: EveryForm) -> dict[str, Tensor]:
        return every_form(OPS[self.bits], LAUNCHERS[self.bits], *self.args)

    def reference(self, out_dtype: torch.dtype) -> Tensor:
        result: Tensor = REFERENCES[self.bits](*replace(self, out_dtype=out_dtype).args)
        return result

    def integers(self) -> Tensor:
        products = self.xq.long() @ self.q.long().t()
        if self.zero_point is None:
            return products
        row = 0 if len(self.zero_point) == 1 else int(self.group)
        return products - self.zero_point[row].long() * self.q.long().sum(1)


def problem(
    *shape: int,
    n: int,
    bits: int = 8,
    static: bool = True,
    table_groups: int = 3,
    seed: int = 0,
    finish: str = "plain",
) -> Problem:
    g = torch.Generator().manual_seed(seed)
    low = -(1 << (bits - 1))
    q = torch.randint(low, -low, (n, shape[-1]), dtype=torch.int8, generator=g)
    zero_point = torch.randint(-128, 128, (table_groups,), dtype=torch.int32, generator=g) if static else None
    scale_shape = (table_groups,) if static else shape[:-1]
    gated, activated = finish in ("gate and residual", "all"), finish in ("gelu", "all")
    return Problem(
        bits=bits,
        xq=torch.randint(-128, 128, shape, dtype=torch.int8, generator=g),
        q=q,
        weight=pack_int4(q) if bits == 4 else q,
        weight_scale=(torch.rand(n, generator=g) + 0.1) * 1e-2,
        input_scale=torch.rand(scale_shape, generator=g) + 0.1,
        zero_point=zero_point,
        bias=torch.randn(table_groups, n, generator=g),
        group=torch.randint(0, table_groups, (1,), generator=g),
        gate=torch.randn(shape[0], *[1] * (len(shape) - 2), n, generator=g) if gated else None,
        residual=torch.randn(*shape[:-1], n, generator=g) if gated else None,
        activation="gelu_tanh" if activated else "none",
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("static", [True, False])
@settings(max_examples=15, deadline=None)
@given(size=sizes, table_groups=groups, seed=seeds)
def test_integers_equal_int64_exactly(
    every_form: EveryForm, bits: int, static: bool, size: tuple[int, int, int], table_groups: int, seed: int
) -> None:
    m, half, n = size
    k = 2 * half if bits == 4 else 2 * half - 1
    p = problem(m, k, n=n, bits=bits, static=static, table_groups=table_groups, seed=seed)
    p = replace(p, out_dtype=torch.int32)
    assert torch.equal(p.reference(torch.int32).long(), p.integers())
    for form, y in p.forms(every_form).items():
        assert y.dtype == torch.int32 and torch.equal(y.long(), p.integers()), form


def allowed(p: Problem) -> tuple[Tensor, Tensor]:
    """The fp64 result, and how far an fp32 epilogue may be from it: each step rounds its result by 2^-24 of it."""
    exact = p.reference(torch.float64)
    if p.input_scale is None:
        scale = torch.ones(1)
    else:
        scale = p.input_scale[..., None] if p.zero_point is None else p.input_scale[int(p.group) % len(p.input_scale)]
    scaled = (p.integers().double() * scale.double() * p.weight_scale.double()).abs()
    size = scaled + (0 if p.bias is None else p.bias.abs().amax(0))
    if p.activation != "none":
        size = 8 * size + 1  # GELU's slope is at most 1.13; its sigmoid adds roundings relative to its argument
    if p.gate is not None:
        size = size * (1 + p.gate.abs())
    if p.residual is not None:
        size = size + p.residual.abs()
    return exact, 6 * 2**-24 * size


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("finish", FINISHES)
@settings(max_examples=6, deadline=None)
@given(size=sizes, table_groups=groups, seed=seeds)
def test_the_epilogue_is_fp32(
    every_form: EveryForm,
    bits: int,
    static: bool,
    finish: str,
    size: tuple[int, int, int],
    table_groups: int,
    seed: int,
) -> None:
    m, half, n = size
    p = problem(m, 2 * half, n=n, bits=bits, static=static, table_groups=table_groups, seed=seed, finish=finish)
    exact, tolerance = allowed(p)
    for form, y in p.forms(every_form).items():
        assert ((y.double() - exact).abs() <= tolerance).all(), form


def test_the_reference_is_what_it_says() -> None:
    p = problem(2, 5, 16, n=7, finish="all")
    assert p.gate is not None and p.residual is not None and p.bias is not None
    z = p.integers() * (p.input_scale[p.group].double() * p.weight_scale.double()) + p.bias[p.group]
    y = p.residual + p.gate * torch.nn.functional.gelu(z, approximate="tanh")
    torch.testing.assert_close(p.reference(torch.float64), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 0, 32), (0, 3, 32)])
def test_no_rows(every_form: EveryForm, shape: tuple[int, ...]) -> None:
    for form, y in problem(*shape, n=7, static=False, finish="all").forms(every_form).items():
        assert y.shape == (*shape[:-1], 7), form


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("finish", FINISHES)
def test_one_input_scale_may_be_in_the_weights(every_form: EveryForm, bits: int, finish: str) -> None:
    """Then with the zero point in the bias: no table but the bias is left."""
    p = replace(problem(5, 32, n=7, bits=bits, static=False, finish=finish), input_scale=None)
    exact, tolerance = allowed(p)
    for form, y in p.forms(every_form).items():
        assert ((y.double() - exact).abs() <= tolerance).all(), form
    with pytest.raises(ValueError, match="input_scale: expected float32 .* beside an input_zero_point, got None"):
        OPS[bits](*replace(problem(5, 32, n=7, bits=bits), input_scale=None).args)


@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32), (2, 3, 2, 32)])
def test_gates_of_every_size(every_form: EveryForm, shape: tuple[int, ...]) -> None:
    """[B, 1, N] for [B, T, N], as modulation makes it, also as a chunk of something wider; all sizes; a single row."""
    lead = shape[:-1]
    for wanted in (lead, (lead[0], *[1] * (len(lead) - 1)), (1,) * len(lead)):
        gate = torch.randn(*wanted, 21).chunk(3, dim=-1)[1]
        p = replace(problem(*shape, n=7), gate=gate)
        exact, tolerance = allowed(p)
        for form, y in p.forms(every_form).items():
            assert ((y.double() - exact).abs() <= tolerance).all(), (form, wanted)


@given(samples=st.integers(1, 7), each=st.integers(1, 9), most=st.integers(1, 80))
def test_pieces_are_whole_samples_or_lie_within_one(samples: int, each: int, most: int) -> None:
    found = list(_epilogue.pieces(samples * each, each, most))
    assert [row for piece in found for row in range(*piece)] == list(range(samples * each))
    for start, stop in found:
        assert 0 < stop - start <= most
        assert start % each == stop % each == 0 or start // each == (stop - 1) // each


@pytest.mark.parametrize("values", [7, 40, 56, 200])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_a_gate_of_samples_in_pieces(monkeypatch: pytest.MonkeyPatch, values: int, tokens: int) -> None:
    for finish in ("gate and residual", "all"):
        p = problem(4, tokens, 16, n=7, static=False, finish=finish)
        assert p.gate is not None
        for gate in (p.gate, p.gate[:, :1], p.gate[:1, :1]):
            q = replace(p, gate=gate)
            exact, tolerance = allowed(q)
            with monkeypatch.context() as patch:
                patch.setattr(_int_matmul, "_VALUES_AT_ONCE", values)
                patch.setattr(_int_matmul, "_VALUES_WHOLE", 0)
                assert ((linear_w8a8(*q.args).double() - exact).abs() <= tolerance).all()


def test_a_gate_is_never_repeated_for_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read where it lies, by a broadcast, also where a piece holds several samples."""
    monkeypatch.setattr(_int_matmul, "_VALUES_AT_ONCE", 2 * 6 * 8)
    monkeypatch.setattr(_int_matmul, "_VALUES_WHOLE", 0)
    gate = torch.randn(4, 1, 8)
    p = replace(problem(4, 6, 16, n=8), gate=gate)
    seen = []

    def apply(self: _epilogue.Epilogue, acc: Tensor, into: Tensor | None = None) -> Tensor:
        assert self.gate is not None
        seen.append((self.gate.shape, self.gate.untyped_storage().data_ptr() == gate.untyped_storage().data_ptr()))
        return acc

    monkeypatch.setattr(_epilogue.Epilogue, "apply", apply)
    linear_w8a8(*p.args)
    assert seen == [((2, 1, 8), True)] * 2


@pytest.mark.parametrize("finish", FINISHES)
def test_a_single_row_without_leading_sizes(finish: str) -> None:
    p = problem(1, 16, n=7, finish=finish)
    flat: dict[str, Any] = {
        "xq": p.xq[0],
        **{k: v[0] for k in ("gate", "residual") if (v := getattr(p, k)) is not None},
    }
    assert torch.equal(linear_w8a8(*replace(p, **flat).args), linear_w8a8(*p.args)[0])


@pytest.mark.parametrize("bits", BITS)
def test_an_odd_n_is_announced(caplog: pytest.LogCaptureFixture, bits: int) -> None:
    announce.cache_clear()
    with caplog.at_level(logging.WARNING, "diffusers_dq_kernels"):
        for n in (16, 17, 24):
            p = problem(3, 32, n=n, bits=bits)
            LAUNCHERS[bits](*p.args)
    assert caplog.messages == [f"linear_w{bits}a8: N is not a multiple of 16: values are stored one by one, slower"]


@pytest.mark.parametrize("values", [7, 40, 200])
def test_large_products_are_finished_in_pieces(monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    for finish in FINISHES:
        for static in (True, False):
            p = problem(3, 5, 16, n=8, static=static, finish=finish)
            whole = linear_w8a8(*p.args)
            with monkeypatch.context() as patch:
                patch.setattr(_int_matmul, "_VALUES_AT_ONCE", values)
                patch.setattr(_int_matmul, "_VALUES_WHOLE", values)
                # not bit for bit: vectorised sigmoids round otherwise in the rest of a vector
                torch.testing.assert_close(linear_w8a8(*p.args), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_output_dtypes_and_leading_sizes(every_form: EveryForm, bits: int, out_dtype: torch.dtype) -> None:
    p = replace(problem(2, 3, 20, n=9, bits=bits), out_dtype=out_dtype)
    exact, tolerance = allowed(p)
    for y in p.forms(every_form).values():
        assert y.shape == (2, 3, 9) and y.dtype == out_dtype and y.is_contiguous()
        # a whole eps: the interpreter cuts off bits where a GPU rounds. fp64 outputs carry fp32 values.
        assert ((y.double() - exact).abs() <= tolerance + torch.finfo(out_dtype).eps * exact.abs()).all()


@pytest.mark.parametrize("bias_shape", ["none", "[N]", "[1, N]", "[G, N]"])
def test_bias_shapes(every_form: EveryForm, bias_shape: str) -> None:
    p = problem(5, 32, n=7)
    assert p.bias is not None
    given_bias = {"none": None, "[N]": p.bias[0], "[1, N]": p.bias[:1], "[G, N]": p.bias}[bias_shape]
    expected = {"none": 0, "[G, N]": p.bias[int(p.group)]}.get(bias_shape, p.bias[0])
    exact = replace(p, bias=None).reference(torch.float64) + expected
    for y in replace(p, bias=given_bias).forms(every_form).values():
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [0, 1, 17])
@pytest.mark.parametrize("k", [1, 15, 144])
def test_awkward_sizes(every_form: EveryForm, m: int, k: int) -> None:
    p = replace(problem(m, k, n=3), out_dtype=torch.int32)
    for y in p.forms(every_form).values():
        assert y.shape == (m, 3) and torch.equal(y.long(), p.integers())


def test_extreme_values_do_not_saturate(every_form: EveryForm) -> None:
    for a, b in ((127, 127), (-128, -128), (-128, 127)):
        p = problem(3, 2048, n=16, static=False)
        p = replace(p, xq=torch.full_like(p.xq, a), weight=torch.full_like(p.q, b), out_dtype=torch.int32)
        for y in p.forms(every_form).values():
            assert (y == 2048 * a * b).all()


@settings(max_examples=20, deadline=None)
@given(m=st.integers(0, 5), k=st.integers(1, 3000), seed=seeds)
def test_the_floating_point_path_of_old_cpus_is_exact(m: int, k: int, seed: int) -> None:
    p = problem(m, k, n=4, seed=seed, static=False)
    assert torch.equal(_int_matmul.float_int_matmul(p.xq, p.q).long(), p.integers())


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("poison", [127, -128])
@pytest.mark.parametrize("k", [38, 48])
def test_neighbours_in_memory_are_neither_read_nor_written(
    every_form: EveryForm, bits: int, poison: int, k: int
) -> None:
    p = problem(5, k, n=7, bits=bits, finish="all")
    expected = p.forms(every_form)

    def surrounded(inner: Tensor) -> Tensor:
        around = torch.full((inner.shape[0] + 4, inner.shape[1] + 32), poison, dtype=torch.int8).to(inner.dtype)
        around[2:-2, 16:-16] = inner
        return around

    arrays = {"xq": p.xq, "weight": p.weight, "residual": p.residual, "gate": p.gate}
    around = {name: surrounded(tensor) for name, tensor in arrays.items() if tensor is not None}
    before = {name: tensor.clone() for name, tensor in around.items()}
    inside: dict[str, Any] = {name: tensor[2:-2, 16:-16] for name, tensor in around.items()}
    for form, y in replace(p, **inside).forms(every_form).items():
        assert torch.equal(y, expected[form])
    assert all(torch.equal(around[name], before[name]) for name in around)


@pytest.mark.parametrize("bits", BITS)
def test_opcheck(bits: int) -> None:
    for static in (True, False):
        for finish in ("plain", "all"):
            p = problem(2, 3, 20, n=9, bits=bits, static=static, finish=finish)
            torch.library.opcheck(OPS[bits].op, p.args)
    torch.library.opcheck(OPS[bits].op, replace(problem(2, 3, 20, n=9, bits=bits), out_dtype=torch.int32).args)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("static", [True, False])
def test_a_new_group_does_not_recompile(bits: int, finish: str, static: bool) -> None:
    p = problem(2, 3, 20, n=9, bits=bits, static=static, finish=finish)

    def run(group: Tensor) -> Tensor:
        result: Tensor = OPS[bits](*replace(p, group=group).args)
        return result

    torch._dynamo.reset()  # the parametrised tests compile one code object many times
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for g in (1, 2, 0):
            assert_like_eager(compiled(torch.tensor([g])), run(torch.tensor([g])), p)


def assert_like_eager(compiled: Tensor, eager: Tensor, p: Problem) -> None:
    """The compiled form leaves the zero point to an fp32 offset: a few 2^-24 of what cancels there, then what gate,
    GELU (slope 1.13) and residual make of it."""
    products = (p.xq.double().abs() @ p.q.double().abs().t()) + 128 * p.q.double().abs().sum(1)
    size = products * p.input_scale.max() * p.weight_scale.double() + 10
    size = size * (1 if p.gate is None else 1 + p.gate.abs())
    assert ((compiled.double() - eager.double()).abs() <= 8 * 2**-24 * size).all()


@pytest.mark.parametrize("zero_point", [-128, 127])
def test_the_compiled_zero_point_at_full_width(zero_point: int) -> None:
    p = problem(4, 4608, n=33, table_groups=1)
    p = replace(p, zero_point=torch.tensor([zero_point], dtype=torch.int32), bias=None, group=torch.zeros(1).long())
    torch._dynamo.reset()
    compiled = torch.compile(lambda xq: linear_w8a8(*replace(p, xq=xq).args), fullgraph=True, backend="aot_eager")
    assert_like_eager(compiled(p.xq), p.reference(torch.float64), p)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("static", [True, False])
def test_compiled_integers_are_bare_too(bits: int, static: bool) -> None:
    p = replace(problem(2, 3, 20, n=9, bits=bits, static=static), out_dtype=torch.int32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda xq: OPS[bits](*replace(p, xq=xq).args), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(p.xq).long(), p.integers())


@pytest.mark.parametrize("bits", BITS)
def test_dynamic_shapes_compile_once(bits: int) -> None:
    p = problem(8, 20, n=9, bits=bits, static=False)

    def run(xq: Tensor, input_scale: Tensor) -> Tensor:
        result: Tensor = OPS[bits](*replace(p, xq=xq, input_scale=input_scale).args)
        return result

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(p.xq, p.input_scale)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (3, 5):
            assert torch.equal(compiled(p.xq[:m], p.input_scale[:m]), run(p.xq[:m], p.input_scale[:m]))


@pytest.mark.parametrize("launcher", [linear_w8a8, LAUNCHERS[8]])
def test_bad_arguments_say_what_was_given(launcher: Callable[..., Tensor]) -> None:
    p = problem(4, 20, n=9, finish="all")
    assert p.bias is not None and p.gate is not None and p.residual is not None
    for change, message in (
        ({"xq": p.xq.float()}, r"xq: expected int8 \[..., K\], got torch.float32 \[4, 20\]"),
        ({"weight": p.weight[:, :19]}, r"weight: expected int8 \[N, 20\], got int8 \[9, 19\]"),
        ({"weight": p.weight.view(torch.uint8)}, r"weight: expected int8 \[N, 20\], got uint8 \[9, 20\]"),
        ({"weight_scale": p.weight_scale[:5]}, r"weight_scale: expected float32 \[9\], got float32 \[5\]"),
        ({"input_scale": p.input_scale.double()}, r"input_scale: expected float32 \[G\], got float64 \[3\]"),
        ({"zero_point": None}, r"input_scale: expected float32 \[4\], got float32 \[3\]"),
        ({"input_scale": p.input_scale[:2]}, r"the same number .*, got input_scale 2, input_zero_point 3, bias 3"),
        ({"bias": p.bias[:2]}, r"the same number .*, got input_scale 3, input_zero_point 3, bias 2"),
        ({"bias": p.bias[:, :3]}, r"bias: .* \[G, 9\], got float32 \[3, 3\]"),
        ({"gate": p.gate[:3]}, r"gate: expected float \[4, 9\].*got torch.float32 \[3, 9\]"),
        ({"residual": p.residual[:3]}, r"residual: .* \[4, 9\], got float32 \[3, 9\]"),
        ({"activation": "relu"}, r"activation: expected one of .*, got 'relu'"),
        ({"out_dtype": torch.int8}, r"out_dtype: .* got torch.int8"),
        ({"out_dtype": torch.int32}, r"bare integers: no gate, residual or activation"),
    ):
        with pytest.raises(ValueError, match=message):
            launcher(*replace(p, **change).args)  # type: ignore[arg-type]


def test_packed_weights_have_an_even_k() -> None:
    p = problem(4, 20, n=9, bits=4)
    with pytest.raises(ValueError, match=r"weight: expected uint8 \[N, 10\], got int8 \[9, 20\]"):
        linear_w4a8(*replace(p, weight=p.q).args)
    with pytest.raises(ValueError, match="even K, got K = 19"):
        linear_w4a8(*replace(p, xq=p.xq[:, :19]).args)


def on_gpu(p: Problem) -> Problem:
    return replace(p, **{name: value.cuda() for name, value in vars(p).items() if isinstance(value, Tensor)})


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 60, 500, 4096])
@pytest.mark.parametrize("k", [1152, 2240, 100])
def test_every_tile_is_exact_on_the_gpu(bits: int, m: int, k: int) -> None:
    p = replace(on_gpu(problem(m, k, n=1000, bits=bits)), out_dtype=torch.int32)
    assert torch.equal(OPS[bits](*p.args), p.reference(torch.int32))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("finish", FINISHES)
def test_every_finish_on_the_gpu(bits: int, finish: str) -> None:
    p = on_gpu(problem(4, 300, 1152, n=1152, bits=bits, finish=finish))
    exact, tolerance = allowed(p)
    assert ((OPS[bits](*p.args).double() - exact).abs() <= tolerance).all()


@needs_gpu
@pytest.mark.gpu
def test_one_cuda_graph_serves_all_groups() -> None:
    p = on_gpu(problem(256, 1152, n=1152, finish="all"))
    linear_w8a8(*p.args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_w8a8(*p.args)
    for g in range(3):
        p.group.fill_(g)
        graph.replay()
        assert torch.equal(y, linear_w8a8(*p.args))
