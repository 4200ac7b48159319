# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_dq_kernels import linear_w4a16, linear_w8a16, weight_only, pack_int4

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


def test_a_new_group_does_not_recompile() -> None:
    *w8, _ = problem(4, 32, n=16, bits=8, dtype=torch.bfloat16)
    *w4, _ = problem(4, 32, n=16, bits=4, dtype=torch.bfloat16)

    def run(group: Tensor) -> tuple[Tensor, Tensor]:
        return linear_w8a16(*w8, group), linear_w4a16(*w4, group)

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


@pytest.mark.parametrize("offset", [1, 8, 16, 33])
def test_operands_at_any_address_are_read_right(offset):
    """Tensors of a mapped safetensors file start anywhere; PyTorch's own kernel crashes on them."""
    m, n, k = 2, 32, 64
    weight = torch.randint(-128, 128, (n * k + offset,), dtype=torch.int8)[offset:].view(n, k)
    x = torch.randn(m * k + offset, dtype=torch.bfloat16)[offset:].view(m, k)
    scale, group = torch.rand(n), torch.zeros(1, dtype=torch.long)
    actual = linear_w8a16(x, weight, scale, None, group)
    assert torch.equal(actual, linear_w8a16(x.clone(), weight.clone(), scale, None, group))
