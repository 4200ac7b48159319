# SPDX-License-Identifier: Apache-2.0
"""linear_grouped: exact integers within a group of input channels, fp32 scales and sums over the groups."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_dq_kernels import grouped, pack_int4
from diffusers_dq_kernels.grouped import linear_grouped, linear_grouped_reference

EveryForm = Callable[..., dict[str, Any]]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAUNCHER = grouped._linear_grouped_triton
GROUPS = (32, 64, 96, 128, 288)
VARIANTS = ("per token", "per token, zero points", "per group", "per group, zero points")

sizes = st.tuples(st.integers(1, 40), st.integers(1, 2), st.integers(1, 40))
seeds = st.integers(0, 999)


@dataclass(frozen=True)
class Problem:
    xq: Tensor
    q: Tensor
    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    input_zero_point: Tensor | None
    weight_zero_point: Tensor | None
    bias: Tensor | None
    group: Tensor
    out_dtype: torch.dtype = torch.float32
    gate: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"

    @property
    def centred(self) -> Tensor:
        """q - weight_zero_point, [N, K / g, g] int64."""
        q = self.q.long().unflatten(1, (self.weight_scale.shape[1], -1))
        return q if self.weight_zero_point is None else q - self.weight_zero_point.long()[..., None]

    @property
    def args(self) -> tuple[Any, ...]:
        weight_sum = None if self.input_zero_point is None else self.centred.sum(2, dtype=torch.int32)
        fields = dict(vars(self))
        del fields["q"]
        values = list(fields.values())
        return (*values[:6], weight_sum, *values[6:])

    def forms(self, every_form: EveryForm) -> dict[str, Tensor]:
        return every_form(linear_grouped, LAUNCHER, *self.args)

    def terms(self) -> Tensor:
        """What is summed over groups: [K / g, M, N] fp64, from int64."""
        x = self.xq.long().reshape(-1, self.xq.shape[-1]).unflatten(1, (self.weight_scale.shape[1], -1))
        if self.input_zero_point is not None:
            x = x - self.input_zero_point.long().flatten(0, -2)[..., None]
        integers = torch.einsum("mjk,njk->jmn", x, self.centred)
        scale = self.input_scale.double().flatten(0, -2).t()[:, :, None] * self.weight_scale.double().t()[:, None]
        return integers * scale


def problem(
    *shape: int, n: int, g: int, variant: str, packed: bool = True, seed: int = 0, finish: str = "plain"
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    lead, groups, low = shape[:-1], shape[-1] // g, -8 if packed else -128

    def integers(low: int, high: int, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, size, dtype=dtype, generator=generator)

    q = integers(low, -low, (n, shape[-1]), torch.int8)
    zero_points, activated = "zero points" in variant, finish in ("gelu", "all")
    gated = finish in ("gate and residual", "all")
    return Problem(
        xq=integers(-128, 128, shape, torch.int8),
        q=q,
        weight=pack_int4(q) if packed else q,
        weight_scale=(torch.rand(n, groups, generator=generator) + 0.1) * 1e-2,
        input_scale=torch.rand(*lead, groups if "group" in variant else 1, generator=generator) + 0.1,
        input_zero_point=integers(-128, 128, (*lead, groups), torch.int32) if zero_points else None,
        weight_zero_point=integers(-8, 8, (n, groups), torch.int8) if zero_points and packed else None,
        bias=torch.randn(3, n, generator=generator),
        group=integers(0, 3, (1,), torch.int64),
        gate=torch.randn(lead[0], *[1] * (len(lead) - 1), n, generator=generator) if gated else None,
        residual=torch.randn(*lead, n, generator=generator) if gated else None,
        activation="gelu_tanh" if activated else "none",
    )


def with_exact_sums(p: Problem) -> Problem:
    """Scales of 1 / 2 and 1 and no bias: sums of multiples of 1 / 4 that fp32 holds while they are below 2^22."""
    halves = {
        name: (getattr(p, name) > getattr(p, name).median()) / 2 + 0.5 for name in ("weight_scale", "input_scale")
    }
    p = replace(p, bias=None, **halves)
    assert p.terms().abs().sum(0).max() < 2**22
    return p


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("g", GROUPS)
@settings(max_examples=4, deadline=None)
@given(size=sizes, seed=seeds)
def test_sums_that_fp32_holds_are_exact(
    every_form: EveryForm, g: int, packed: bool, variant: str, size: tuple[int, int, int], seed: int
) -> None:
    m, groups, n = size
    p = with_exact_sums(problem(m, groups * g, n=n, g=g, variant=variant, packed=packed, seed=seed))
    exact = p.terms().sum(0)
    assert torch.equal(linear_grouped_reference(*replace(p, out_dtype=torch.float64).args), exact)
    for form, y in p.forms(every_form).items():
        assert y.dtype == torch.float32 and torch.equal(y.double(), exact), form


@pytest.mark.parametrize("g", [96, 288])
def test_many_groups(every_form: EveryForm, g: int) -> None:
    for variant in VARIANTS:
        p = with_exact_sums(problem(3, 1152, n=5, g=g, variant=variant, packed=g == 96))
        for form, y in p.forms(every_form).items():
            assert torch.equal(y.double(), p.terms().sum(0)), form


def allowed(p: Problem) -> tuple[Tensor, Tensor]:
    """The fp64 result, and how far fp32 may be from it.

    A term is rounded by two scales, and the sum by each of its terms: 2^-24 of the sum of their sizes every time.
    """
    lead = (*p.xq.shape[:-1], len(p.q))
    exact = linear_grouped_reference(*replace(p, out_dtype=torch.float64).args)
    size = p.terms().abs().sum(0).view(lead) + (0 if p.bias is None else p.bias.abs().amax(0))
    if p.activation != "none":
        size = 8 * size + 1  # GELU's slope is at most 1.13; its sigmoid adds roundings relative to its argument
    if p.gate is not None:
        size = size * (1 + p.gate.abs())
    if p.residual is not None:
        size = size + p.residual.abs()
    return exact, (p.weight_scale.shape[1] + 8) * 2**-24 * size


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("finish", ["plain", "gelu", "gate and residual", "all"])
@settings(max_examples=4, deadline=None)
@given(size=sizes, g=st.sampled_from(GROUPS), packed=st.booleans(), seed=seeds)
def test_scales_sums_and_epilogue_are_fp32(
    every_form: EveryForm, finish: str, variant: str, size: tuple[int, int, int], g: int, packed: bool, seed: int
) -> None:
    m, groups, n = size
    p = problem(m, groups * g, n=n, g=g, variant=variant, packed=packed, seed=seed, finish=finish)
    exact, tolerance = allowed(p)
    for form, y in p.forms(every_form).items():
        assert ((y.double() - exact).abs() <= tolerance).all(), form


def test_the_reference_is_what_it_says() -> None:
    p = problem(2, 5, 192, n=7, g=96, variant="per group, zero points", finish="all")
    assert p.gate is not None and p.residual is not None and p.bias is not None
    z = p.terms().sum(0).view(2, 5, 7) + p.bias[p.group]
    y = p.residual + p.gate * torch.nn.functional.gelu(z, approximate="tanh")
    actual = linear_grouped_reference(*replace(p, out_dtype=torch.float64).args)
    torch.testing.assert_close(actual, y, rtol=1e-12, atol=1e-12)


def test_every_nibble_with_every_zero_point(every_form: EveryForm) -> None:
    """One row of the input reads one channel of the weight; all that q - zero_point may be."""
    q = torch.arange(-8, 8, dtype=torch.int8).repeat(241, 2)
    zero_point = torch.arange(-120, 121, dtype=torch.int8)[:, None]
    p = problem(32, 32, n=241, g=32, variant="per token")
    ones = dict(weight_scale=torch.ones(241, 1), input_scale=torch.ones(32, 1), bias=None)
    p = replace(p, xq=torch.eye(32, dtype=torch.int8), q=q, weight=pack_int4(q), weight_zero_point=zero_point, **ones)
    for form, y in p.forms(every_form).items():
        assert torch.equal(y.t().long(), q.long() - zero_point), form
    odd = torch.cat([p.weight.new_zeros(1), p.weight.flatten()])[1:].view_as(p.weight)
    for form, y in replace(p, weight=odd).forms(every_form).items():
        assert torch.equal(y.t().long(), q.long() - zero_point), form


@pytest.mark.parametrize("values", [(127, 127, 0), (-128, -128, 0), (-128, 127, 127), (127, -128, -128)])
def test_extreme_values_do_not_saturate(every_form: EveryForm, values: tuple[int, int, int]) -> None:
    x, w, zero_point = values
    p = with_exact_sums(problem(3, 96, n=16, g=96, variant="per token, zero points", packed=False))
    assert p.input_zero_point is not None
    ones = dict(weight_scale=torch.ones(16, 1), input_scale=torch.ones(3, 1))
    filled = dict(xq=torch.full_like(p.xq, x), q=torch.full_like(p.q, w), weight=torch.full_like(p.q, w))
    p = replace(p, **filled, **ones, input_zero_point=torch.full_like(p.input_zero_point, zero_point))
    for y in p.forms(every_form).values():
        assert (y == 96 * (x - zero_point) * w).all()


@pytest.mark.parametrize("shape", [(2, 3, 64), (64,), (0, 64)])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_output_dtypes_and_leading_sizes(
    every_form: EveryForm, shape: tuple[int, ...], out_dtype: torch.dtype
) -> None:
    for variant in VARIANTS:
        p = replace(problem(1, *shape, n=9, g=32, variant=variant), out_dtype=out_dtype)
        zero_point = None if p.input_zero_point is None else p.input_zero_point[0]
        p = replace(p, xq=p.xq[0], input_scale=p.input_scale[0], input_zero_point=zero_point)
        exact = linear_grouped_reference(*replace(p, out_dtype=torch.float64).args)
        for y in p.forms(every_form).values():
            assert y.shape == (*shape[:-1], 9) and y.dtype == out_dtype and y.is_contiguous()
            assert torch.allclose(y.double(), exact, rtol=2 * torch.finfo(out_dtype).eps, atol=1e-4)


def test_tables_of_any_strides(every_form: EveryForm) -> None:
    p = problem(5, 192, n=7, g=64, variant="per group, zero points")
    tables = ("weight_scale", "input_scale", "input_zero_point", "weight_zero_point")
    turned: dict[str, Any] = {name: getattr(p, name).t().contiguous().t() for name in tables}
    expected = p.forms(every_form)
    for form, y in replace(p, **turned).forms(every_form).items():
        assert torch.equal(y, expected[form])


@pytest.mark.parametrize("values", [7, 40, 200])
def test_large_products_are_finished_in_pieces(monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    for variant in VARIANTS:
        p = problem(3, 5, 64, n=8, g=32, variant=variant, finish="all")
        whole = linear_grouped(*p.args)
        with monkeypatch.context() as patch:
            patch.setattr(grouped, "_VALUES_AT_ONCE", values)
            # not bit for bit: vectorised sigmoids round otherwise in the rest of a vector
            torch.testing.assert_close(linear_grouped(*p.args), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("poison", [127, -128])
@pytest.mark.parametrize("margin", [16, 15])
def test_neighbours_in_memory_are_neither_read_nor_written(
    every_form: EveryForm, packed: bool, poison: int, margin: int
) -> None:
    p = problem(5, 96, n=7, g=32, variant="per group, zero points", packed=packed, finish="all")
    expected = p.forms(every_form)

    def surrounded(inner: Tensor) -> Tensor:
        around = torch.full((inner.shape[0] + 4, inner.shape[1] + 32), poison, dtype=torch.int8).to(inner.dtype)
        around[2:-2, margin : margin + inner.shape[1]] = inner
        return around

    names = ("xq", "weight", "weight_scale", "input_scale", "input_zero_point", "residual", "gate")
    around = {name: surrounded(getattr(p, name)) for name in names}
    before = {name: tensor.clone() for name, tensor in around.items()}
    inside: dict[str, Any] = {
        name: tensor[2:-2, margin : margin + getattr(p, name).shape[1]] for name, tensor in around.items()
    }
    for form, y in replace(p, **inside).forms(every_form).items():
        assert torch.equal(y, expected[form])
    assert all(torch.equal(around[name], before[name]) for name in around)


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(variant: str) -> None:
    for packed in (True, False):
        for finish in ("plain", "all"):
            p = problem(2, 3, 64, n=9, g=32, variant=variant, packed=packed, finish=finish)
            torch.library.opcheck(linear_grouped.op, p.args)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_group_does_not_recompile(variant: str) -> None:
    p = problem(2, 3, 64, n=9, g=32, variant=variant, finish="all")

    def run(group: Tensor) -> Tensor:
        result: Tensor = linear_grouped(*replace(p, group=group).args)
        return result

    torch._dynamo.reset()  # the parametrised tests compile one code object many times
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for g in (1, 2, 0):
            assert torch.equal(compiled(torch.tensor([g])), run(torch.tensor([g])))


@pytest.mark.parametrize("launcher", [linear_grouped, LAUNCHER])
def test_bad_arguments_say_what_was_given(launcher: Callable[..., Tensor]) -> None:
    p = problem(4, 192, n=9, g=64, variant="per group, zero points")
    assert p.input_zero_point is not None and p.weight_zero_point is not None
    names = ("xq", "weight", "weight_scale", "input_scale", "input_zero_point", "weight_zero_point", "weight_sum")
    of_groups, finish = dict(zip(names, p.args, strict=False)), p.args[len(names) :]
    for change, message in (
        ({"xq": p.xq.float()}, r"xq: expected int8 \[..., K\], got torch.float32 \[4, 192\]"),
        ({"weight": p.q}, r"weight_zero_point: expected None for int8 weights"),
        ({"weight": p.weight[:, :90]}, r"weight: expected uint8 \[N, 96\], got uint8 \[9, 90\]"),
        ({"weight_scale": p.weight_scale[0]}, r"weight_scale: expected float32 \[9, K / g\], got float32 \[3\]"),
        ({"input_scale": p.input_scale[:, :2]}, r"input_scale: expected float32 \[4, 3\], got float32 \[4, 2\]"),
        ({"input_scale": p.input_scale[:3, :1]}, r"input_scale: expected float32 \[4, 1\], got float32 \[3, 1\]"),
        ({"input_zero_point": p.input_zero_point.long()}, r"input_zero_point: expected int32 \[4, 3\], got int64"),
        ({"weight_zero_point": p.weight_zero_point[:5]}, r"weight_zero_point: expected int8 \[9, 3\], got int8 \[5"),
        ({"weight_sum": None}, r"weight_sum: expected int32 \[9, 3\] beside an input_zero_point, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            launcher(*{**of_groups, **change}.values(), *finish)
    with pytest.raises(ValueError, match=r"out_dtype: expected a floating-point type, got torch.int32"):
        launcher(*replace(p, out_dtype=torch.int32).args)
    uneven = problem(4, 192, n=9, g=48, variant="per token")
    with pytest.raises(ValueError, match=r"weight_scale: K = 192 allows groups of 32, 64, 96, 192, got \[9, 4\]"):
        launcher(*uneven.args)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("m", [1, 60, 500])
@pytest.mark.parametrize("g", GROUPS)
def test_every_tile_on_the_gpu(variant: str, packed: bool, m: int, g: int) -> None:
    p = problem(m, 4 * g, n=1000, g=g, variant=variant, packed=packed, finish="all")
    exact, tolerance = allowed(p)
    y = linear_grouped(*(value.cuda() if isinstance(value, Tensor) else value for value in p.args)).cpu()
    assert ((y.double() - exact).abs() <= tolerance).all()
