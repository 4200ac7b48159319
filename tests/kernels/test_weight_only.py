# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_dq_kernels import linear_w4a16, linear_w8a16, pack_int4, unpack_int4, weight_only

EveryForm = Callable[..., dict[str, Any]]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

W8 = (linear_w8a16, weight_only._linear_w8a16_triton, weight_only.linear_w8a16_reference)
W4 = (linear_w4a16, weight_only._linear_w4a16_triton, weight_only.linear_w4a16_reference)

# Two roundings to x's dtype where PyTorch rounds the sum before our fp32 scale, each by half an eps, one of them a
# whole eps in the interpreter, which cuts off.
ROUNDINGS = {torch.float32: 0.0, torch.bfloat16: 1.5 * 2**-7, torch.float16: 1.5 * 2**-10}


def problem(*shape: int, n: int, bits: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    weight = torch.randint(low, high, (n, shape[-1]), dtype=torch.int8, generator=g)
    return (
        torch.randn(shape, generator=g).to(dtype),
        pack_int4(weight) if bits == 4 else weight,
        torch.rand(n, generator=g) * 0.01 + 0.001,
        torch.randn(3, n, generator=g),
        torch.randint(0, 3, (1,), generator=g),
    )


def runs(form: str, dtype: torch.dtype) -> bool:
    """Triton's interpreter keeps bf16 as bit patterns and multiplies those; the GPU tests cover bf16."""
    return form != "triton interpreter" or dtype != torch.bfloat16


def allowed(reference: Callable[..., Tensor], args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The fp64 result, and how far rounding may move it: fp32 sums of K terms, then the dtype's own roundings."""
    x, weight, scale, bias, group = args
    exact = reference(x.double(), weight, scale, bias, group)
    size = reference(x.double().abs(), weight, scale, None, group).abs() + bias[group].abs() + exact.abs()
    terms = x.double().norm(dim=-1, keepdim=True) * 128 * x.shape[-1] ** 0.5 * scale
    return exact, ROUNDINGS[x.dtype] * size + x.shape[-1] * 2**-24 * terms + 2**-22 * size


@pytest.mark.parametrize(("forms", "bits"), [(W8, 8), (W4, 4)])
@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(1, 20),
    half=st.integers(1, 70),
    n=st.integers(1, 70),
    dtype=st.sampled_from(list(ROUNDINGS)),
    seed=st.integers(0, 999),
)
def test_forms_agree_with_the_reference(
    every_form: EveryForm, forms: Any, bits: int, m: int, half: int, n: int, dtype: torch.dtype, seed: int
) -> None:
    op, launcher, reference = forms
    args = problem(m, 2 * half, n=n, bits=bits, dtype=dtype, seed=seed)
    exact, tolerance = allowed(reference, args)
    for form, y in every_form(op, launcher, *args).items():
        assert y.dtype == dtype and y.shape == (m, n)
        assert not runs(form, dtype) or ((y.double() - exact).abs() <= tolerance).all(), form


def grouped_problem(
    *shape: int, n: int, g: int, bits: int, dtype: torch.dtype, zero_points: bool, seed: int = 0
) -> tuple[Any, ...]:
    x, weight, _, bias, group = problem(*shape, n=n, bits=bits, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    of_groups = (n, shape[-1] // g)
    scale = torch.rand(of_groups, generator=generator) * 0.01 + 0.001
    reach = 120 if bits == 4 else 128
    zero_point = torch.randint(-reach, reach, of_groups, dtype=torch.int8, generator=generator)
    return x, weight, scale, bias, group, None, None, "none", zero_point if zero_points else None


def allowed_of_groups(reference: Callable[..., Tensor], args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """As `allowed`, where W is scaled before or after the sum, in fp32, or rounded to bf16 where x is."""
    x, weight, scale, bias, group, *_, zero_point = args
    exact = reference(x.double(), *args[1:])
    q = (unpack_int4(weight) if weight.dtype == torch.uint8 else weight).long().unflatten(1, (scale.shape[1], -1))
    w = (q if zero_point is None else q - zero_point.long()[..., None]) * scale.double()[..., None]
    terms = x.double().abs() @ w.flatten(1).abs().t()
    rounded = 2**-8 * terms if x.dtype == torch.bfloat16 else 0
    fp32 = (x.shape[-1] + 8) * 2**-24 * (terms + bias[group].abs())
    return exact, rounded + ROUNDINGS[x.dtype] * (exact.abs() + bias[group].abs()) + fp32


@pytest.mark.parametrize(("forms", "bits"), [(W8, 8), (W4, 4)])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("g", [32, 96, 128, 288])
@settings(max_examples=5, deadline=None)
@given(
    m=st.sampled_from([1, 5, 20, 40]),
    groups=st.integers(1, 2),
    n=st.integers(1, 70),
    dtype=st.sampled_from(list(ROUNDINGS)),
    seed=st.integers(0, 999),
)
def test_scales_of_groups(
    every_form: EveryForm,
    forms: Any,
    bits: int,
    zero_points: bool,
    g: int,
    m: int,
    groups: int,
    n: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    op, launcher, reference = forms
    args = grouped_problem(m, groups * g, n=n, g=g, bits=bits, dtype=dtype, zero_points=zero_points, seed=seed)
    exact, tolerance = allowed_of_groups(reference, args)
    for form, y in every_form(op, launcher, *args).items():
        assert y.dtype == dtype and y.shape == (m, n)
        assert not runs(form, dtype) or ((y.double() - exact).abs() <= tolerance).all(), form


@pytest.mark.parametrize(("forms", "bits"), [(W8, 8), (W4, 4)])
def test_scales_of_groups_are_exact_where_fp32_is(every_form: EveryForm, forms: Any, bits: int) -> None:
    """Small integers times powers of two: no step rounds. All groups of a long K, and a weight at an odd address."""
    op, launcher, reference = forms
    _, weight, scale, _, group, *_, zero_point = grouped_problem(
        3, 1152, n=40, g=96, bits=bits, dtype=torch.float32, zero_points=True
    )
    x = torch.randint(-4, 5, (3, 1152)).float()
    odd = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view_as(weight)
    halves = (scale > 0.005) / 2 + 0.5
    for zero in (None, zero_point):
        q = (unpack_int4(weight) if bits == 4 else weight).long().unflatten(1, (12, -1))
        w = (q if zero is None else q - zero.long()[..., None]) * halves[..., None]
        expected = x.double() @ w.flatten(1).double().t()
        for stored in (weight, odd):
            args = (x, stored, halves, None, group, None, None, "none", zero)
            assert torch.equal(reference(*args).double(), expected)
            for form, y in every_form(op, launcher, *args).items():
                assert torch.equal(y.double(), expected), form


def test_few_rows_of_bf16_are_rounded_once() -> None:
    """Grouped weights are not rounded to bf16 where it is their bytes that cost time: only the result is."""
    x, weight, scale, _, group, *rest = grouped_problem(
        3, 256, n=40, g=32, bits=4, dtype=torch.bfloat16, zero_points=False
    )
    exact = weight_only.linear_w4a16_reference(x.double(), weight, scale, None, group, *rest)
    y = linear_w4a16(x, weight, scale, None, group, *rest)
    fp32 = 264 * 2**-24 * x.double().norm(dim=1, keepdim=True) * (8 * scale.double()).norm(dim=1) * 32**0.5
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + fp32).all()


@pytest.mark.parametrize("rows", [7, 32, 33])
def test_grouped_weights_are_dequantized_in_pieces(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    args = grouped_problem(3, 64, n=33, g=32, bits=4, dtype=torch.float32, zero_points=True)
    whole = linear_w4a16(*args)
    monkeypatch.setattr(weight_only, "_WEIGHTS_AT_ONCE", rows * 64)
    torch.testing.assert_close(linear_w4a16(*args), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("forms", "bits"), [(W8, 8), (W4, 4)])
@pytest.mark.parametrize("shape", [(4, 1152), (1, 16), (2, 3, 64), (0, 32)])
def test_shapes_of_modulation_linears(every_form: EveryForm, forms: Any, bits: int, shape: tuple[int, ...]) -> None:
    op, launcher, reference = forms
    args = problem(*shape, n=48, bits=bits, dtype=torch.bfloat16)
    exact, tolerance = allowed(reference, args)
    for form, y in every_form(op, launcher, *args).items():
        assert y.shape == (*shape[:-1], 48) and y.is_contiguous()
        assert not runs(form, y.dtype) or ((y.double() - exact).abs() <= tolerance).all(), form


def test_fp16_sums_do_not_overflow_before_the_scale(every_form: EveryForm) -> None:
    x = torch.full((2, 1152), 4.0, dtype=torch.float16)
    weight = torch.full((16, 1152), 127, dtype=torch.int8)
    scale = torch.full((16,), 1e-3)
    for y in every_form(*W8[:2], x, weight, scale, None, torch.tensor([0])).values():
        torch.testing.assert_close(y.float(), torch.full((2, 16), 4 * 1152 * 0.127), rtol=1e-3, atol=0)


def test_fp64_is_fp64() -> None:
    args = problem(3, 20, n=5, bits=8, dtype=torch.float64)
    exact = args[0] @ (args[1].double() * args[2].double()[:, None]).t() + args[3][args[4]].double()
    torch.testing.assert_close(linear_w8a16(*args), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize(("forms", "bits"), [(W8, 8), (W4, 4)])
@pytest.mark.parametrize("k", [38, 96])
def test_neighbours_in_memory_are_neither_read_nor_written(
    every_form: EveryForm, forms: Any, bits: int, k: int
) -> None:
    op, launcher, reference = forms
    args = problem(5, k, n=7, bits=bits, dtype=torch.float32)
    exact, tolerance = allowed(reference, args)
    around_x = torch.full((9, 128), float("nan"))
    around_x[2:7, 16 : 16 + k] = args[0]
    before = around_x.nan_to_num()
    for y in every_form(op, launcher, around_x[2:7, 16 : 16 + k], *args[1:]).values():
        assert ((y.double() - exact).abs() <= tolerance).all()
    assert torch.equal(around_x.nan_to_num(), before)


def test_opcheck() -> None:
    for op, bits in ((linear_w8a16, 8), (linear_w4a16, 4)):
        torch.library.opcheck(op.op, problem(2, 3, 20, n=9, bits=bits, dtype=torch.float32))
        x, weight, scale, bias, group = problem(4, 32, n=16, bits=bits, dtype=torch.bfloat16)
        torch.library.opcheck(op.op, (x, weight, scale, bias[0], group))
        torch.library.opcheck(op.op, (x, weight, scale, None, group))
        for zero_points in (False, True):
            args = grouped_problem(2, 3, 64, n=9, g=32, bits=bits, dtype=torch.float32, zero_points=zero_points)
            torch.library.opcheck(op.op, args)


def test_a_new_group_does_not_recompile() -> None:
    *w8, _ = problem(4, 32, n=16, bits=8, dtype=torch.bfloat16)
    *w4, _ = problem(4, 32, n=16, bits=4, dtype=torch.bfloat16)
    of_groups = grouped_problem(4, 64, n=16, g=32, bits=4, dtype=torch.bfloat16, zero_points=True)

    def run(group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grouped = linear_w4a16(*of_groups[:4], group, *of_groups[5:])
        return linear_w8a16(*w8, group), linear_w4a16(*w4, group), grouped

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for g in (1, 2, 0):
            assert all(map(torch.equal, compiled(torch.tensor([g])), run(torch.tensor([g]))))


def test_bad_arguments_say_what_was_given() -> None:
    x, weight, scale, bias, group = problem(4, 20, n=9, bits=8, dtype=torch.float32)
    for form in W8[:2]:
        with pytest.raises(ValueError, match=r"x: expected float \[..., K\], got torch.int8"):
            form(weight, weight, scale, bias, group)
        with pytest.raises(ValueError, match=r"weight: expected int8 \[N, 20\], got int8 \[9, 18\]"):
            form(x, weight[:, :18], scale, bias, group)
        with pytest.raises(ValueError, match=r"weight_scale: expected float32 \[9, K / g\], got float32 \[5, 2\]"):
            form(x, weight, torch.ones(5, 2), bias, group)
        with pytest.raises(ValueError, match=r"weight_scale: K = 20 allows no groups .*, got \[9, 2\]: 2 groups"):
            form(x, weight, torch.ones(9, 2), bias, group)
        zero_point = torch.zeros(9, 2, dtype=torch.int8)
        with pytest.raises(ValueError, match=r"weight_scale: expected \[N, K / g\] beside a weight_zero_point"):
            form(x, weight, scale, bias, group, None, None, "none", zero_point)
        with pytest.raises(ValueError, match=r"weight_zero_point: expected int8 \[9, 1\], got int8 \[9, 2\]"):
            form(x, weight, torch.ones(9, 1), bias, group, None, None, "none", zero_point)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("forms", "bits"), [(W8, 8), (W4, 4)])
@pytest.mark.parametrize("dtype", list(ROUNDINGS))
@pytest.mark.parametrize("m", [2, 60, 300])
def test_every_tile_on_the_gpu(forms: Any, bits: int, dtype: torch.dtype, m: int) -> None:
    op, _, reference = forms
    args = problem(m, 1152, n=1000, bits=bits, dtype=dtype)
    exact, tolerance = allowed(reference, args)
    y = op(*(tensor.cuda() for tensor in args)).cpu()
    assert ((y.double() - exact).abs() <= tolerance).all()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("forms", "bits"), [(W8, 8), (W4, 4)])
@pytest.mark.parametrize("dtype", list(ROUNDINGS))
@pytest.mark.parametrize("m", [2, 60, 300])
@pytest.mark.parametrize("g", [32, 96, 128])
def test_scales_of_groups_on_the_gpu(forms: Any, bits: int, dtype: torch.dtype, m: int, g: int) -> None:
    op, _, reference = forms
    args = grouped_problem(m, 1152, n=1000, g=g, bits=bits, dtype=dtype, zero_points=True)
    exact, tolerance = allowed_of_groups(reference, args)
    y = op(*(value.cuda() if isinstance(value, Tensor) else value for value in args)).cpu()
    assert ((y.double() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("offset", [1, 8, 16, 33])
def test_operands_at_any_address_are_read_right(offset):
    """Tensors of a mapped safetensors file start anywhere; PyTorch's own kernel crashes on them."""
    m, n, k = 2, 32, 64
    weight = torch.randint(-128, 128, (n * k + offset,), dtype=torch.int8)[offset:].view(n, k)
    x = torch.randn(m * k + offset, dtype=torch.bfloat16)[offset:].view(m, k)
    scale, group = torch.rand(n), torch.zeros(1, dtype=torch.long)
    actual = linear_w8a16(x, weight, scale, None, group)
    assert torch.equal(actual, linear_w8a16(x.clone(), weight.clone(), scale, None, group))
