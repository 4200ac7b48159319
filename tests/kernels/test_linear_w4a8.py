# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_dq_kernels import linear_w4a8, linear_w4a8_dynamic, linear_w4a8_static, linear_w8a8, pack_int4

EveryForm = Callable[..., dict[str, Any]]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

sizes = st.tuples(st.integers(1, 70), st.integers(1, 75), st.integers(1, 70))


def problem(*shape: int, n: int, table_groups: int = 3, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (n, shape[-1]), dtype=torch.int8, generator=g)
    return {
        "xq": torch.randint(-128, 128, shape, dtype=torch.int8, generator=g),
        "q": q,
        "packed": pack_int4(q),
        "weight_scale": torch.rand(n, generator=g) + 0.1,
        "weight_sum": q.sum(1, dtype=torch.int32),
        "input_scales": torch.rand(table_groups, generator=g) + 0.1,
        "zero_points": torch.randint(-128, 128, (table_groups,), dtype=torch.int32, generator=g),
        "row_scales": torch.rand(shape[:-1], generator=g) + 0.1,
        "bias": torch.randn(table_groups, n, generator=g),
        "group": torch.randint(0, table_groups, (1,), generator=g),
    }


STATIC = ("weight_scale", "weight_sum", "input_scales", "zero_points", "bias", "group")
DYNAMIC = ("weight_scale", "row_scales", "bias", "group")


def arguments(p: dict[str, Tensor], names: tuple[str, ...], out_dtype: torch.dtype) -> tuple[Any, ...]:
    return (p["xq"], p["packed"], *(p[name] for name in names), out_dtype)


@settings(max_examples=20, deadline=None)
@given(size=sizes, table_groups=st.integers(1, 4), seed=st.integers(0, 999))
def test_integers_equal_int64_exactly(
    every_form: EveryForm, size: tuple[int, int, int], table_groups: int, seed: int
) -> None:
    m, half, n = size
    p = problem(m, 2 * half, n=n, table_groups=table_groups, seed=seed)
    products = p["xq"].long() @ p["q"].long().t()
    corrected = products - p["zero_points"][p["group"]].long() * p["q"].long().sum(1)
    for op, launcher, reference, names, expected in (
        (
            linear_w4a8_static,
            linear_w4a8._linear_w4a8_static_triton,
            linear_w4a8.linear_w4a8_static_reference,
            STATIC,
            corrected,
        ),
        (
            linear_w4a8_dynamic,
            linear_w4a8._linear_w4a8_dynamic_triton,
            linear_w4a8.linear_w4a8_dynamic_reference,
            DYNAMIC,
            products,
        ),
    ):
        args = arguments(p, names, torch.int32)
        assert torch.equal(reference(*args).long(), expected)
        for form, y in every_form(op, launcher, *args).items():
            assert y.dtype == torch.int32 and torch.equal(y.long(), expected), form


@pytest.mark.parametrize("shape", [(1, 128), (2, 3, 64), (70, 130)])
def test_the_epilogue_is_that_of_w8a8(every_form: EveryForm, shape: tuple[int, ...]) -> None:
    p = problem(*shape, n=67)
    args = arguments(p, STATIC, torch.float32)
    exact = linear_w8a8.linear_w8a8_static_reference(p["xq"], p["q"], *args[2:-1], torch.float64)
    # Five fp32 roundings of 2^-24, as in test_linear_w8a8.py.
    allowed = 5 * 2**-24 * (exact.abs() + 3 * p["bias"][p["group"]].abs())
    for y in every_form(linear_w4a8_static, linear_w4a8._linear_w4a8_static_triton, *args).values():
        assert y.shape == (*shape[:-1], 67) and y.is_contiguous()
        assert ((y.double() - exact).abs() <= allowed).all()


def test_empty_batch(every_form: EveryForm) -> None:
    args = arguments(problem(0, 32, n=5), STATIC, torch.bfloat16)
    for y in every_form(linear_w4a8_static, linear_w4a8._linear_w4a8_static_triton, *args).values():
        assert y.shape == (0, 5) and y.dtype == torch.bfloat16


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("poison", [0x77, 0x88])
@pytest.mark.parametrize("k", [38, 96])
def test_neighbours_in_memory_are_neither_read_nor_written(every_form: EveryForm, poison: int, k: int) -> None:
    p = problem(5, k, n=7)
    around_x = torch.full((9, 128), poison - 128, dtype=torch.int8)
    around_x[2:7, 16 : 16 + k] = p["xq"]
    around_weight = torch.full((11, 96), poison, dtype=torch.uint8)
    around_weight[2:9, 16 : 16 + k // 2] = p["packed"]
    before = around_x.clone(), around_weight.clone()
    expected = linear_w4a8.linear_w4a8_static_reference(*arguments(p, STATIC, torch.int32))
    p |= {"xq": around_x[2:7, 16 : 16 + k], "packed": around_weight[2:9, 16 : 16 + k // 2]}
    args = arguments(p, STATIC, torch.int32)
    for y in every_form(linear_w4a8_static, linear_w4a8._linear_w4a8_static_triton, *args).values():
        assert torch.equal(y, expected)
    assert torch.equal(around_x, before[0]) and torch.equal(around_weight, before[1])


def test_opcheck() -> None:
    p = problem(2, 3, 20, n=9)
    torch.library.opcheck(linear_w4a8_static.op, arguments(p, STATIC, torch.float32))
    torch.library.opcheck(linear_w4a8_dynamic.op, arguments(p, DYNAMIC, torch.int32))


def test_a_new_group_does_not_recompile() -> None:
    p = problem(2, 3, 20, n=9)

    def run(group: Tensor) -> tuple[Tensor, Tensor]:
        here = p | {"group": group}
        return (
            linear_w4a8_static(*arguments(here, STATIC, torch.bfloat16)),
            linear_w4a8_dynamic(*arguments(here, DYNAMIC, torch.bfloat16)),
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for g in (1, 2, 0):
            assert all(map(torch.equal, compiled(torch.tensor([g])), run(torch.tensor([g]))))


@pytest.mark.parametrize("launcher", [linear_w4a8_dynamic, linear_w4a8._linear_w4a8_dynamic_triton])
def test_bad_arguments_say_what_was_given(launcher: Callable[..., Tensor]) -> None:
    p = problem(4, 20, n=9)
    with pytest.raises(ValueError, match=r"weight: expected uint8 \[N, 10\], got int8 \[9, 20\]"):
        launcher(*arguments(p | {"packed": p["q"]}, DYNAMIC, torch.float32))
    with pytest.raises(ValueError, match="even K, got K = 19"):
        launcher(*arguments(p | {"xq": p["xq"][:, :19]}, DYNAMIC, torch.float32))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 60, 4096])
@pytest.mark.parametrize("k", [1152, 2240, 100])
def test_every_tile_is_exact_on_the_gpu(m: int, k: int) -> None:
    p = {name: tensor.cuda() for name, tensor in problem(m, k, n=1000).items()}
    args = arguments(p, STATIC, torch.int32)
    assert torch.equal(linear_w4a8_static(*args), linear_w4a8.linear_w4a8_static_reference(*args))
