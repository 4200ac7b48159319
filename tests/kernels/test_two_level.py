# SPDX-License-Identifier: Apache-2.0
"""linear_w4a8 with a multiplier for every group of input channels, and how group scales become multipliers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_dq_kernels import linear_w4a8, pack_int4, w4a8
from diffusers_dq_kernels.packing import pack_two_level, split_multipliers

EveryForm = Callable[..., dict[str, Any]]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAUNCHER = w4a8._linear_w4a8_triton
GROUPS = (32, 64, 96, 128, 288)


def problem(m: int, k: int, n: int, g: int, seed: int = 0, finish: bool = False) -> tuple[tuple[Any, ...], Tensor]:
    """(arguments that ask for fp32, W as int64 [N, K])."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    multiplier = torch.randint(1, 17, (n, k // g), dtype=torch.int8, generator=generator)
    weight, weight_sum = pack_two_level(q, multiplier)
    args = (
        torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator),
        weight,
        torch.rand(n, generator=generator) * 1e-3,
        torch.rand(3, generator=generator),
        torch.randint(-128, 128, (3,), dtype=torch.int32, generator=generator),
        weight_sum,
        torch.randn(3, n, generator=generator),
        torch.randint(0, 3, (1,), generator=generator),
        torch.float32,
        torch.randn(1, n, generator=generator) if finish else None,
        torch.randn(m, n, generator=generator) if finish else None,
        "gelu_tanh" if finish else "none",
        multiplier,
    )
    return args, q.long() * multiplier.long().repeat_interleave(g, 1)


def for_integers(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*args[:8], torch.int32, None, None, "none", args[12])


@pytest.mark.parametrize("g", GROUPS)
@settings(max_examples=6, deadline=None)
@given(size=st.tuples(st.integers(1, 70), st.integers(1, 2), st.integers(1, 70)), seed=st.integers(0, 999))
def test_integers_equal_int64_exactly(every_form: EveryForm, g: int, size: tuple[int, int, int], seed: int) -> None:
    m, groups, n = size
    args, w = problem(m, groups * g, n, g, seed)
    expected = (args[0].long() - args[4][args[7]].long()) @ w.t()
    assert torch.equal(args[5].long(), w.sum(1))
    assert torch.equal(w4a8.linear_w4a8_reference(*for_integers(args)).long(), expected)
    for form, y in every_form(linear_w4a8, LAUNCHER, *for_integers(args)).items():
        assert y.dtype == torch.int32 and torch.equal(y.long(), expected), form


@pytest.mark.parametrize("g", [96, 128, 288])
def test_wide_inputs_and_the_epilogue(every_form: EveryForm, g: int) -> None:
    """The epilogue itself is tested with the other linears: here it is that of a plain weight with these values."""
    args, w = problem(5, 1152, 9, g, finish=True)
    scale = args[2].double() * args[3][args[7]].double()
    z = (args[0].long() - args[4][args[7]].long()) @ w.t() * scale + args[6][args[7]]
    expected = args[10] + args[9] * torch.nn.functional.gelu(z.double(), approximate="tanh")
    for form, y in every_form(linear_w4a8, LAUNCHER, *args).items():
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5, msg=form)


def test_every_nibble_with_every_multiplier(every_form: EveryForm) -> None:
    """One row of the input reads one channel of the weight. From bytes at odd addresses, too."""
    q = torch.arange(-8, 8, dtype=torch.int8).repeat(16, 2)
    multiplier = torch.arange(1, 17, dtype=torch.int8)[:, None]
    weight, _ = pack_two_level(q, multiplier)
    odd = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view_as(weight)
    dynamic = (torch.ones(16), torch.ones(32), None, None, None, torch.tensor([0]), torch.int32, None, None, "none")
    for stored in (weight, odd):
        for form, y in every_form(
            linear_w4a8, LAUNCHER, torch.eye(32, dtype=torch.int8), stored, *dynamic, multiplier
        ).items():
            assert torch.equal(y.t().long(), q.long() * multiplier), form


def test_two_bytes_are_read_at_once_where_a_gpu_can() -> None:
    """An interpreter reads two bytes from any address, a GPU from even ones."""
    data = torch.zeros(8 * 40 + 1, dtype=torch.uint8)
    assert data.data_ptr() % 2 == 0
    rows = data[:-1].view(8, 40)
    for weight, pairs in (
        (rows, True),
        (data[1:].view(8, 40), False),
        (rows[:, :20], True),
        (rows[:, :19], False),
        (rows[:, 1:21], False),
        (data[: 8 * 38 + 8].view(8, 39)[:, :38], False),
        (rows.t()[:, :8].t()[:, :20], True),
        (data[: 8 * 20].view(20, 8).t(), True),
    ):
        assert w4a8.reads_pairs(weight) == pairs


def test_an_odd_number_of_bytes_in_rows_of_even_stride(every_form: EveryForm) -> None:
    q = torch.randint(-8, 8, (7, 38), dtype=torch.int8)
    x = torch.randint(-128, 128, (5, 38), dtype=torch.int8)
    weight = torch.full((7, 32), 0x77, dtype=torch.uint8)[:, :19].copy_(pack_int4(q))
    rest = (torch.ones(7), torch.ones(5), None, None, None, torch.tensor([0]), torch.int32)
    for form, y in every_form(linear_w4a8, LAUNCHER, x, weight, *rest).items():
        assert torch.equal(y.long(), x.long() @ q.long().t()), form


def test_without_multipliers_nothing_changes(every_form: EveryForm) -> None:
    args, _ = problem(5, 96, 7, 32)
    ones = torch.ones_like(args[12])
    expected = every_form(linear_w4a8, LAUNCHER, *for_integers(args)[:12])
    for form, y in every_form(linear_w4a8, LAUNCHER, *for_integers(args)[:12], ones).items():
        assert torch.equal(y, expected[form])


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("poison", [127, -128])
def test_neighbours_in_memory_are_neither_read_nor_written(every_form: EveryForm, poison: int) -> None:
    args, w = problem(5, 96, 7, 32)
    expected = (args[0].long() - args[4][args[7]].long()) @ w.t()
    around = torch.full((11, 3 + 32), poison, dtype=torch.int8)
    around[2:-2, 16:19] = args[12]
    before = around.clone()
    for y in every_form(linear_w4a8, LAUNCHER, *for_integers(args)[:12], around[2:-2, 16:19]).values():
        assert torch.equal(y.long(), expected)
    assert torch.equal(around, before)


def test_opcheck() -> None:
    for finish in (False, True):
        args, _ = problem(4, 64, 9, 32, finish=finish)
        torch.library.opcheck(linear_w4a8.op, args)
        torch.library.opcheck(linear_w4a8.op, for_integers(args))


def test_a_new_group_does_not_recompile() -> None:
    args, _ = problem(4, 64, 9, 32, finish=True)

    def run(group: Tensor) -> Tensor:
        result: Tensor = linear_w4a8(*args[:7], group, *args[8:])
        return result

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for g in (1, 2, 0):
            # the compiled form leaves the zero point to an fp32 offset (test_integer_linears.py has the bound)
            torch.testing.assert_close(compiled(torch.tensor([g])), run(torch.tensor([g])), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("launcher", [linear_w4a8, LAUNCHER])
def test_bad_multipliers_say_what_was_given(launcher: Callable[..., Tensor]) -> None:
    args, _ = problem(4, 192, 9, 64)
    for multiplier, message in (
        (args[12].int(), r"weight_multiplier: expected int8 \[9, K / g\], got int32 \[9, 3\]"),
        (args[12][:5], r"weight_multiplier: expected int8 \[9, K / g\], got int8 \[5, 3\]"),
        (
            args[12].repeat(1, 3),
            r"K = 192 allows groups of 32, 64, 96, 192, got \[9, 9\]: 9 groups",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            launcher(*args[:12], multiplier)


# Making such weights


def test_weights_are_checked_when_they_are_made() -> None:
    q, multiplier = torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 2, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"multipliers in \[1, 16\], got \[0, 17\]"):
        pack_two_level(q, torch.tensor([[0, 1], [17, 1]], dtype=torch.int8))
    with pytest.raises(ValueError, match=r"multiplier int8 \[2, K / g\], got torch.int8 \[1, 2\]"):
        pack_two_level(q, multiplier[:1])
    with pytest.raises(ValueError, match=r"multiplier: K = 64 allows groups of 32, 64, got \[2, 4\]"):
        pack_two_level(q, multiplier.repeat(1, 2))
    with pytest.raises(ValueError, match=r"values in \[-8, 7\], got \[0, 8\]"):
        pack_two_level(q + 8 * (torch.arange(64) == 3).to(torch.int8), multiplier)
    packed, weight_sum = pack_two_level(q - 8, multiplier * 16)
    assert torch.equal(packed, pack_int4(q - 8)) and weight_sum.tolist() == [-128 * 64] * 2


@settings(deadline=None)
@given(n=st.integers(0, 5), groups=st.integers(1, 9), spread=st.integers(0, 8), seed=st.integers(0, 999))
def test_split_scales_are_off_by_half_a_step(n: int, groups: int, spread: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(n, groups, generator=generator) * 2.0 ** -torch.randint(
        0, spread + 1, (n, groups), generator=generator
    )
    multiplier, channel = split_multipliers(scales)
    assert multiplier.dtype == torch.int8 and channel.dtype == torch.float32
    assert ((multiplier >= 1) & (multiplier <= 16)).all()
    split = multiplier * channel[:, None]
    assert torch.equal(split.amax(1), scales.amax(1))
    # Rounding to a multiple of the channel scale; what is below half of it becomes a whole one.
    error, step = (split - scales).abs(), channel[:, None].expand_as(scales)
    assert (error <= torch.where(scales < step / 2, step - scales, step * 0.5000001)).all()


def test_channels_of_zeros_have_multipliers_too() -> None:
    multiplier, channel = split_multipliers(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert multiplier.tolist() == [[1, 1], [16, 1]] and channel.tolist() == [0.0, 1 / 16]
    with pytest.raises(ValueError, match=r"float \[N, K / g\] with at least one group, got torch.float32 \[3\]"):
        split_multipliers(torch.ones(3))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 60, 500, 4096])
@pytest.mark.parametrize("g", GROUPS)
def test_every_tile_is_exact_on_the_gpu(m: int, g: int) -> None:
    args = for_integers(problem(m, 4 * g, 1000, g)[0])
    y = linear_w4a8(*(value.cuda() if isinstance(value, Tensor) else value for value in args)).cpu()
    assert torch.equal(y, w4a8.linear_w4a8_reference(*args))
