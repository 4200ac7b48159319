# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_dq_kernels import quantize, quantize_dynamic, quantize_static

EveryForm = Callable[..., dict[str, Any]]

shapes = st.tuples(st.integers(1, 5), st.integers(1, 70)) | st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 70))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
groups = st.integers(1, 4)
bits = st.integers(2, 8)
seeds = st.integers(0, 999)


def tables(k: int, table_groups: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scale, zero_point, group, shift, inv_smooth for `table_groups` groups."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.rand(table_groups, generator=g) * 0.05 + 0.005,
        torch.randint(-20, 20, (table_groups,), dtype=torch.int32, generator=g),
        torch.randint(0, table_groups, (1,), generator=g),
        torch.randn(table_groups, k, generator=g),
        torch.rand(k, generator=g) + 0.5,
    )


@settings(max_examples=25, deadline=None)
@given(shape=shapes, dtype=dtypes, table_groups=groups, b=bits, plain=st.booleans(), seed=seeds)
def test_static_forms_agree_to_the_bit(
    every_form: EveryForm,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    table_groups: int,
    b: int,
    plain: bool,
    seed: int,
) -> None:
    scale, zero_point, group, shift, inv_smooth = tables(shape[-1], table_groups, seed)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    before = x.clone()
    args = (x, scale, zero_point, group, None if plain else shift, None if plain else inv_smooth, b)
    expected = quantize.quantize_static_reference(*args)
    for form, q in every_form(quantize_static, quantize._quantize_static_triton, *args).items():
        assert q.shape == x.shape and q.dtype == torch.int8 and q.is_contiguous()
        assert torch.equal(q, expected), form
    assert torch.equal(x, before)


@settings(max_examples=25, deadline=None)
@given(shape=shapes, dtype=dtypes, table_groups=groups, b=bits, plain=st.booleans(), seed=seeds)
def test_dynamic_forms_agree_to_the_bit(
    every_form: EveryForm,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    table_groups: int,
    b: int,
    plain: bool,
    seed: int,
) -> None:
    _, _, group, shift, inv_smooth = tables(shape[-1], table_groups, seed)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    before = x.clone()
    args = (x, group, None if plain else shift, None if plain else inv_smooth, b)
    expected_q, expected_scale = quantize.quantize_dynamic_reference(*args)
    for form, (q, scale) in every_form(quantize_dynamic, quantize._quantize_dynamic_triton, *args).items():
        assert q.shape == x.shape and scale.shape == x.shape[:-1]
        assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale), form
    assert torch.equal(x, before)


@settings(max_examples=50, deadline=None)
@given(m=st.integers(1, 4), k=st.integers(1, 50), b=bits, seed=seeds)
def test_rounding_moves_a_value_by_at_most_half_a_step(m: int, k: int, b: int, seed: int) -> None:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    q, scale = quantize_dynamic(x, torch.tensor([0]), None, None, b)
    # u / scale rounds once in fp32, by a relative 2^-24 of at most 127 steps: 2^-17 of a step.
    assert ((q * scale[:, None].double() - x).abs() <= scale[:, None] * (0.5 + 2**-16)).all()

    step, zero_point = torch.tensor([0.01]), torch.tensor([3], dtype=torch.int32)
    low, high = -(2 ** (b - 1)), 2 ** (b - 1) - 1
    q = quantize_static(x, step, zero_point, torch.tensor([0]), None, None, b)
    inside = (x >= (low - 3) * step) & (x <= (high - 3) * step)
    assert ((((q - 3.0).double() * step - x).abs() <= step * (0.5 + 2**-16)) | ~inside).all()
    assert (q >= low).all() and (q <= high).all()


def test_halves_round_to_even(every_form: EveryForm) -> None:
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    one, zero = torch.ones(1), torch.tensor([1], dtype=torch.int32)
    args = (x, one, zero, torch.tensor([0]), None, None, 8)
    for q in every_form(quantize_static, quantize._quantize_static_triton, *args).values():
        assert (q - 1).tolist() == [[-2, -2, 0, 0, 2, 2]]


def test_each_group_takes_its_own_row() -> None:
    x = torch.full((2, 3), 4.0)
    scale, zero_point = torch.tensor([1.0, 2.0]), torch.tensor([0, 5], dtype=torch.int32)
    shift = torch.tensor([[0.0, 1.0, 2.0], [2.0, 2.0, 2.0]])
    for g, row in ((0, [4, 3, 2]), (1, [6, 6, 6])):
        q = quantize_static(x, scale, zero_point, torch.tensor([g]), shift, None, 8)
        assert q.tolist() == [row, row]
        # One row serves every group, table by table.
        q = quantize_static(x, scale[:1], zero_point, torch.tensor([g]), shift[:1], None, 8)
        assert q[0].tolist() == [value + 5 * g for value in (4, 3, 2)]


def test_rows_of_zeros_and_empty_batches(every_form: EveryForm) -> None:
    group = torch.tensor([0])
    zeros = torch.zeros(2, 5)
    for q, scale in every_form(
        quantize_dynamic, quantize._quantize_dynamic_triton, zeros, group, None, None, 8
    ).values():
        assert (q == 0).all() and (scale > 0).all()
    empty = torch.zeros(2, 0, 5)
    for q, scale in every_form(
        quantize_dynamic, quantize._quantize_dynamic_triton, empty, group, None, None, 8
    ).values():
        assert q.shape == (2, 0, 5) and scale.shape == (2, 0)
    args = (empty, torch.ones(1), torch.zeros(1, dtype=torch.int32), group, None, None, 8)
    for q in every_form(quantize_static, quantize._quantize_static_triton, *args).values():
        assert q.shape == (2, 0, 5)


def test_rows_longer_than_a_block(every_form: EveryForm) -> None:
    k = quantize._MAX_BLOCK_K + 37
    scale, zero_point, group, shift, inv_smooth = tables(k, 2, 0)
    x = torch.randn(2, k)
    args = (x, scale, zero_point, group, shift, inv_smooth, 8)
    for q in every_form(quantize_static, quantize._quantize_static_triton, *args).values():
        assert torch.equal(q, quantize.quantize_static_reference(*args))
    dynamic = (x, group, shift, inv_smooth, 8)
    for q, _ in every_form(quantize_dynamic, quantize._quantize_dynamic_triton, *dynamic).values():
        assert torch.equal(q, quantize.quantize_dynamic_reference(*dynamic)[0])


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_neighbours_in_memory_are_neither_read_nor_written(every_form: EveryForm, poison: float) -> None:
    scale, zero_point, group, shift, inv_smooth = tables(37, 3, 0)
    buffer = torch.full((9, 50), poison)
    buffer[2:7, 5:42] = torch.randn(5, 37, generator=torch.Generator().manual_seed(0))
    x = buffer[2:7, 5:42]
    static = (x, scale, zero_point, group, shift, inv_smooth, 8)
    expected = quantize.quantize_static_reference(x.clone(), *static[1:])
    before = buffer.clone()
    for q in every_form(quantize_static, quantize._quantize_static_triton, *static).values():
        assert torch.equal(q, expected)
    dynamic = (x, group, shift, inv_smooth, 8)
    expected_dynamic = quantize.quantize_dynamic_reference(x.clone(), *dynamic[1:])
    for result in every_form(quantize_dynamic, quantize._quantize_dynamic_triton, *dynamic).values():
        assert all(map(torch.equal, result, expected_dynamic))
    assert torch.equal(buffer.nan_to_num(), before.nan_to_num())


def test_a_wrong_group_is_an_error_on_the_cpu_and_stays_inside_the_table_in_a_kernel() -> None:
    scale, zero_point, _, _, _ = tables(4, 3, 0)
    args = (torch.randn(2, 4), scale, zero_point, torch.tensor([7]), None, None, 8)
    with pytest.raises(IndexError):
        quantize_static(*args)
    if not torch.cuda.is_available():
        last = quantize.quantize_static_reference(args[0], scale[2:], zero_point[2:], *args[3:])
        assert torch.equal(quantize._quantize_static_triton(*args), last)


def test_opcheck() -> None:
    scale, zero_point, group, shift, inv_smooth = tables(6, 3, 0)
    x = torch.randn(2, 3, 6)
    for arguments in ((scale, zero_point, group, shift, inv_smooth, 8), (scale[:1], zero_point, group, None, None, 4)):
        torch.library.opcheck(quantize_static.op, (x, *arguments))
    torch.library.opcheck(quantize_dynamic.op, (x, group, shift, inv_smooth, 8))
    torch.library.opcheck(quantize_dynamic.op, (x, group, None, None, 4))


def test_a_new_group_does_not_recompile() -> None:
    scale, zero_point, _, shift, inv_smooth = tables(6, 3, 0)
    x = torch.randn(2, 3, 6)

    def both(group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return quantize_static(x, scale, zero_point, group, shift, inv_smooth, 8), *quantize_dynamic(
            x, group, shift, inv_smooth, 8
        )

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for g in (1, 2, 0):
            assert all(map(torch.equal, compiled(torch.tensor([g])), both(torch.tensor([g]))))


@pytest.mark.parametrize("launcher", [quantize_static, quantize._quantize_static_triton])
def test_bad_arguments_say_what_was_given(launcher: Callable[..., Tensor]) -> None:
    scale, zero_point, group, shift, inv_smooth = tables(6, 3, 0)
    x = torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"x: expected float \[..., K\].*torch.int32"):
        launcher(x.int(), scale, zero_point, group, shift, inv_smooth, 8)
    with pytest.raises(ValueError, match=r"shift: expected float32 \[G, 6\], got float32 \[3, 5\]"):
        launcher(x, scale, zero_point, group, shift[:, :5], inv_smooth, 8)
    with pytest.raises(ValueError, match=r"zero_point: expected int32 \[G\], got int64"):
        launcher(x, scale, zero_point.long(), group, shift, inv_smooth, 8)
    with pytest.raises(ValueError, match=r"group: expected int64 \[1\], got int32"):
        launcher(x, scale, zero_point, group.int(), shift, inv_smooth, 8)
    with pytest.raises(ValueError, match="at least one timestep group"):
        launcher(x, scale[:0], zero_point, group, shift, inv_smooth, 8)
    with pytest.raises(ValueError, match="bits: expected 2 to 8, got 9"):
        launcher(x, scale, zero_point, group, shift, inv_smooth, 9)
