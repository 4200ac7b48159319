# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_rounding import check_rounded, exact_input, exact_transform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_dq_kernels import _quantize_rows, quantize
from diffusers_dq_kernels._quantize_rows import triton_form
from diffusers_dq_kernels.quantize import quantize_dynamic, quantize_grouped, quantize_static

EveryForm = Callable[..., dict[str, Any]]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

static_launcher = triton_form("quantize_static", quantize.static_plan)
dynamic_launcher = triton_form("quantize_dynamic", quantize.dynamic_plan)
grouped_launcher = triton_form("quantize_grouped", quantize.grouped_plan)

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
    for form, q in every_form(quantize_static, static_launcher, *args).items():
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
    for form, (q, scale) in every_form(quantize_dynamic, dynamic_launcher, *args).items():
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
    for q in every_form(quantize_static, static_launcher, *args).values():
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
    for q, scale in every_form(quantize_dynamic, dynamic_launcher, zeros, group, None, None, 8).values():
        assert (q == 0).all() and (scale > 0).all()
    empty = torch.zeros(2, 0, 5)
    for q, scale in every_form(quantize_dynamic, dynamic_launcher, empty, group, None, None, 8).values():
        assert q.shape == (2, 0, 5) and scale.shape == (2, 0)
    args = (empty, torch.ones(1), torch.zeros(1, dtype=torch.int32), group, None, None, 8)
    for q in every_form(quantize_static, static_launcher, *args).values():
        assert q.shape == (2, 0, 5)


@pytest.mark.parametrize(("k", "dtype"), [(24576, torch.bfloat16), (16384, torch.float32)])
def test_long_rows(every_form: EveryForm, k: int, dtype: torch.dtype) -> None:
    scale, zero_point, group, shift, inv_smooth = tables(k, 2, 0)
    x = torch.randn(2, k).to(dtype)
    args = (x, scale, zero_point, group, shift, inv_smooth, 8)
    for q in every_form(quantize_static, static_launcher, *args).values():
        assert torch.equal(q, quantize.quantize_static_reference(*args))
    dynamic = (x, group, shift, inv_smooth, 8)
    for q, _ in every_form(quantize_dynamic, dynamic_launcher, *dynamic).values():
        assert torch.equal(q, quantize.quantize_dynamic_reference(*dynamic)[0])


def test_rows_that_fit_in_no_program_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    k = 40000
    x, group = torch.randn(2, k), torch.tensor([0])
    expected = quantize.quantize_dynamic_reference(x, group, None, None, 8)
    with caplog.at_level("WARNING", "diffusers_dq_kernels"):
        assert all(map(torch.equal, dynamic_launcher(x, group, None, None, 8), expected))
    assert "quantize_dynamic: no program holds a row of 40000 float32: plain torch" in caplog.messages


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
    for q in every_form(quantize_static, static_launcher, *static).values():
        assert torch.equal(q, expected)
    dynamic = (x, group, shift, inv_smooth, 8)
    expected_dynamic = quantize.quantize_dynamic_reference(x.clone(), *dynamic[1:])
    for result in every_form(quantize_dynamic, dynamic_launcher, *dynamic).values():
        assert all(map(torch.equal, result, expected_dynamic))
    assert torch.equal(buffer.nan_to_num(), before.nan_to_num())


def test_a_wrong_group_is_an_error_on_the_cpu_and_stays_inside_the_table_in_a_kernel() -> None:
    scale, zero_point, _, _, _ = tables(4, 3, 0)
    args = (torch.randn(2, 4), scale, zero_point, torch.tensor([7]), None, None, 8)
    with pytest.raises(IndexError):
        quantize_static(*args)
    if not torch.cuda.is_available():
        last = quantize.quantize_static_reference(args[0], scale[2:], zero_point[2:], *args[3:])
        assert torch.equal(static_launcher(*args), last)


# Groups of channels


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(0, 3),
    group_size=st.sampled_from([32, 64, 96, 160]),
    groups_of_channels=st.integers(1, 5),
    dtype=dtypes,
    b=bits,
    symmetric=st.booleans(),
    plain=st.booleans(),
    seed=seeds,
)
def test_grouped_forms_agree_to_the_bit(
    every_form: EveryForm,
    m: int,
    group_size: int,
    groups_of_channels: int,
    dtype: torch.dtype,
    b: int,
    symmetric: bool,
    plain: bool,
    seed: int,
) -> None:
    k = group_size * groups_of_channels
    _, _, group, shift, inv_smooth = tables(k, 2, seed)
    x = torch.randn(2, m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    args = (x, group, None if plain else shift, None if plain else inv_smooth, b, group_size, symmetric)
    expected = quantize.quantize_grouped_reference(*args)
    check_rounded(expected, *exact(quantize.grouped_plan, *args))
    for form, results in every_form(quantize_grouped, grouped_launcher, *args).items():
        assert [t.dtype for t in results] == [torch.int8, torch.float32, torch.int32]
        assert [t.shape[2] for t in results] == [k, groups_of_channels, groups_of_channels]
        assert all(map(torch.equal, results, expected)), form


def exact(plan: Callable[..., Any], h: Tensor, *parameters: Any) -> tuple[Any, ...]:
    """What `check_rounded` takes behind the results: u with its error, the rounding, the timestep group."""
    made = plan(*parameters)
    return exact_transform(exact_input(h, made), made.transform), made.rounding, made.transform.group


def test_one_group_of_all_channels_is_a_row() -> None:
    x, group = torch.randn(3, 64), torch.tensor([0])
    q, scale, zero_point = quantize_grouped(x, group, None, None, 8, 64, True)
    expected_q, expected_scale = quantize_dynamic(x, group, None, None, 8)
    assert torch.equal(q, expected_q) and torch.equal(scale[:, 0], expected_scale) and not zero_point.any()


def test_asymmetric_ranges_contain_zero(every_form: EveryForm) -> None:
    x = torch.cat([torch.linspace(2, 6, 32), torch.linspace(-6, -2, 32), torch.linspace(-1, 3, 32), torch.zeros(32)])
    args = (x[None], torch.tensor([0]), None, None, 4, 32, False)
    for q, scale, zero_point in every_form(quantize_grouped, grouped_launcher, *args).values():
        assert zero_point.tolist() == [[-8, 7, -4, -8]]
        torch.testing.assert_close(scale[0, :3], torch.tensor([6.0, 6.0, 4.0]) / 15, rtol=2**-23, atol=0)
        assert q[0, 31] == 7 and q[0, 32] == -8 and (q[0, 96:] == -8).all() and scale[0, 3] > 0


# Rotations


@settings(max_examples=30, deadline=None)
@given(
    lead=st.lists(st.integers(1, 2), max_size=2),
    order=st.sampled_from([1, 2, 4, 8, 16, 64, 36, 72]),
    blocks=st.integers(1, 5),
    dtype=dtypes,
    b=bits,
    plain=st.booleans(),
    seed=seeds,
)
def test_rotated_integers_are_nearest(
    every_form: EveryForm,
    lead: list[int],
    order: int,
    blocks: int,
    dtype: torch.dtype,
    b: int,
    plain: bool,
    seed: int,
) -> None:
    k = order * blocks
    scale, zero_point, group, shift, inv_smooth = tables(k, 3, seed)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, k, generator=g).to(dtype)
    signs = (torch.randint(0, 2, (k,), generator=g) * 2 - 1).to(torch.int8)
    transform = (group, None if plain else shift, None if plain else inv_smooth, b, signs, order)
    static, dynamic = (x, scale, zero_point, *transform), (x, *transform)
    for q in every_form(quantize_static, static_launcher, *static).values():
        check_rounded((q,), *exact(quantize.static_plan, *static))
    for results in every_form(quantize_dynamic, dynamic_launcher, *dynamic).values():
        check_rounded(results, *exact(quantize.dynamic_plan, *dynamic))
    check_rounded((quantize.quantize_static_reference(*static),), *exact(quantize.static_plan, *static))


@pytest.mark.parametrize("order", [2, 32, 64, 256, 36, 72])
@pytest.mark.parametrize("group_size", [32, 64, 96, 192, 2304])
def test_rotations_within_and_across_groups_of_channels(every_form: EveryForm, order: int, group_size: int) -> None:
    g = torch.Generator().manual_seed(order)
    k = 2304
    _, _, group, shift, inv_smooth = tables(k, 3, order)
    signs = (torch.randint(0, 2, (k,), generator=g) * 2 - 1).to(torch.int8)
    for b, symmetric in ((8, True), (4, False)):
        args = (torch.randn(2, k, generator=g), group, shift, inv_smooth, b, group_size, symmetric, signs, order)
        for results in every_form(quantize_grouped, grouped_launcher, *args).values():
            check_rounded(results, *exact(quantize.grouped_plan, *args))


# CPU pieces, compilation, arguments


@pytest.mark.parametrize("at_once", [1, 40, 200])
def test_pieces_give_the_same_integers(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    scale, zero_point, group, shift, inv_smooth = tables(64, 3, 0)
    x = torch.randn(2, 7, 64)
    static, dynamic = (x, scale, zero_point, group, shift, inv_smooth, 8), (x, group, shift, inv_smooth, 8)
    monkeypatch.setattr(_quantize_rows, "_VALUES_AT_ONCE", at_once)
    assert torch.equal(quantize_static(*static), quantize.quantize_static_reference(*static))
    assert all(map(torch.equal, quantize_dynamic(*dynamic), quantize.quantize_dynamic_reference(*dynamic)))
    grouped = (*dynamic, 32, False)
    assert all(map(torch.equal, quantize_grouped(*grouped), quantize.quantize_grouped_reference(*grouped)))


def test_large_inputs_take_little_memory() -> None:
    # 8 M values: pieces of 4 MiB in fp32, where all at once would be 32 MiB.
    pieces = list(_quantize_rows._pieces(1, 8192, _quantize_rows._VALUES_AT_ONCE // 1024))
    assert len(pieces) == 8 and sum(len(range(8192)[rows]) for _, rows in pieces) == 8192
    assert list(_quantize_rows._pieces(5, 3, 7)) == [(slice(i, i + 2), slice(None)) for i in (0, 2, 4)]


def test_opcheck() -> None:
    scale, zero_point, group, shift, inv_smooth = tables(64, 3, 0)
    x, signs = torch.randn(2, 3, 64), torch.ones(64, dtype=torch.int8)
    for arguments in ((scale, zero_point, group, shift, inv_smooth, 8), (scale[:1], zero_point, group, None, None, 4)):
        torch.library.opcheck(quantize_static.op, (x, *arguments))
    torch.library.opcheck(quantize_static.op, (x, scale, zero_point, group, shift, inv_smooth, 8, signs, 16))
    torch.library.opcheck(quantize_dynamic.op, (x, group, shift, inv_smooth, 8))
    torch.library.opcheck(quantize_dynamic.op, (x, group, None, None, 4, signs, 16))
    torch.library.opcheck(quantize_grouped.op, (x, group, shift, inv_smooth, 8, 32, True))
    torch.library.opcheck(quantize_grouped.op, (x, group, None, None, 4, 32, False, signs, 16))


@pytest.mark.parametrize("rotated", [False, True])
def test_new_groups_and_sizes_do_not_recompile(rotated: bool) -> None:
    scale, zero_point, _, shift, inv_smooth = tables(64, 3, 0)
    rotation = (torch.ones(64, dtype=torch.int8), 16) if rotated else ()

    def all_three(x: Tensor, group: Tensor) -> tuple[Tensor, ...]:
        return (
            quantize_static(x, scale, zero_point, group, shift, inv_smooth, 8, *rotation),
            *quantize_dynamic(x, group, shift, inv_smooth, 8, *rotation),
            *quantize_grouped(x, group, shift, inv_smooth, 8, 32, False, *rotation),
        )

    compiled = torch.compile(all_three, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(torch.randn(2, 11, 64), torch.tensor([0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for g, rows in ((1, 12), (2, 5), (0, 40)):
            x = torch.randn(2, rows, 64)
            results, expected = compiled(x, torch.tensor([g])), all_three(x, torch.tensor([g]))
            assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("launcher", [quantize_static, static_launcher])
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
    signs = torch.ones(6, dtype=torch.int8)
    with pytest.raises(ValueError, match="rotation_order: expected a power of two .* got 3"):
        launcher(x, scale, zero_point, group, shift, inv_smooth, 8, signs, 3)
    with pytest.raises(ValueError, match="rotation_order: expected a divisor of 6 in_features, got 4"):
        launcher(x, scale, zero_point, group, shift, inv_smooth, 8, signs, 4)
    with pytest.raises(ValueError, match="rotation_order: expected 1 without rotation_signs, got 2"):
        launcher(x, scale, zero_point, group, shift, inv_smooth, 8, None, 2)
    with pytest.raises(ValueError, match=r"rotation_signs: expected int8 \[6\], got float32 \[6\]"):
        launcher(x, scale, zero_point, group, shift, inv_smooth, 8, torch.ones(6), 2)


@pytest.mark.parametrize("launcher", [quantize_static, static_launcher])
def test_tables_have_one_row_or_as_many_as_the_others(launcher: Callable[..., Tensor]) -> None:
    scale, zero_point, group, shift, _ = tables(6, 3, 0)
    x = torch.randn(2, 6)
    for lengths, message in (
        ((2, 3, 1), "scale 2, zero_point 3, shift 1"),
        ((3, 3, 2), "scale 3, zero_point 3, shift 2"),
        ((1, 2, 3), "scale 1, zero_point 2, shift 3"),
    ):
        with pytest.raises(ValueError, match=f"expected 1 row or the same number of timestep groups, got {message}"):
            launcher(x, scale[: lengths[0]], zero_point[: lengths[1]], group, shift[: lengths[2]], None, 8)
    with pytest.raises(ValueError, match="got scale 2, zero_point 3"):
        launcher(x, scale[:2], zero_point, group, None, None, 8)
    for lengths in ((1, 3, 3), (3, 1, 1), (1, 1, 3), (1, 1, 1)):
        launcher(x, scale[: lengths[0]], zero_point[: lengths[1]], group, shift[: lengths[2]], None, 8)


@pytest.mark.parametrize("launcher", [quantize_grouped, grouped_launcher])
@pytest.mark.parametrize("group_size", [0, -32, 16, 48, 64])
def test_bad_group_sizes(launcher: Callable[..., Tensor], group_size: int) -> None:
    message = f"group_size: expected a multiple of 32 that divides 96 in_features, got {group_size}"
    with pytest.raises(ValueError, match=message):
        launcher(torch.randn(2, 96), torch.tensor([0]), None, None, 8, group_size, True)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("k", "order"), [(1152, 64), (4608, 256), (1152, 1152), (4608, 4608), (13824, 256), (72, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_sizes_on_the_gpu(k: int, order: int, dtype: torch.dtype) -> None:
    scale, zero_point, group, shift, inv_smooth = tables(k, 3, 0)
    x = torch.randn(2, 500, k).to(dtype)
    signs = (torch.randint(0, 2, (k,)) * 2 - 1).to(torch.int8)

    def check(op: Callable[..., Any], plan: Callable[..., Any], *args: Any) -> None:
        results = op(*(t.cuda() if isinstance(t, Tensor) else t for t in args))
        results = tuple(t.cpu() for t in results) if isinstance(results, tuple) else (results.cpu(),)
        check_rounded(results, *exact(plan, *args))

    for rotation in ((), (signs, order)):
        check(quantize_static, quantize.static_plan, x, scale, zero_point, group, shift, inv_smooth, 8, *rotation)
        check(quantize_dynamic, quantize.dynamic_plan, x, group, shift, inv_smooth, 8, *rotation)
        if k % 96 == 0:
            grouped = (x, group, shift, inv_smooth, 4, 96, False, *rotation)
            check(quantize_grouped, quantize.grouped_plan, *grouped)


@needs_gpu
@pytest.mark.gpu
def test_one_cuda_graph_serves_all_groups() -> None:
    arguments = [t.cuda() for t in tables(1152, 3, 0)]
    x, group = torch.randn(256, 1152, device="cuda"), arguments[2]
    signs = torch.ones(1152, dtype=torch.int8, device="cuda")
    quantize_static(x, *arguments, 8, signs, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = quantize_static(x, *arguments, 8, signs, 64)
    for g in range(3):
        group.fill_(g)
        graph.replay()
        assert torch.equal(q, quantize_static(x, *arguments, 8, signs, 64))
