# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact_rounding import check_rounded, exact_input, exact_transform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_dq_kernels import _quantize_rows, fused_quantize, quantize
from diffusers_dq_kernels._quantize_rows import apply_plan, triton_form
from diffusers_dq_kernels.fused_quantize import (
    gelu_quantize_dynamic,
    gelu_quantize_static,
    norm_quantize_dynamic,
    norm_quantize_static,
)

EveryForm = Callable[..., dict[str, Any]]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@dataclass(frozen=True)
class Op:
    op: Callable[..., Any]
    plan: Callable[..., Any]
    static: bool
    norm: bool

    @property
    def launcher(self) -> Callable[..., Any]:
        return triton_form(self.plan.__name__, self.plan)


OPS = (
    Op(norm_quantize_static, fused_quantize.norm_static_plan, static=True, norm=True),
    Op(norm_quantize_dynamic, fused_quantize.norm_dynamic_plan, static=False, norm=True),
    Op(gelu_quantize_static, fused_quantize.gelu_static_plan, static=True, norm=False),
    Op(gelu_quantize_dynamic, fused_quantize.gelu_dynamic_plan, static=False, norm=False),
)
NORM_OPS = OPS[:2]
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.plan.__name__)
every_norm_op = pytest.mark.parametrize("op", NORM_OPS, ids=lambda op: op.plan.__name__)

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
seeds = st.integers(0, 999)


@dataclass(frozen=True)
class Problem:
    """Arguments of any of the ops for h [B, T, K]. None stands for what an argument can do without."""

    h: Tensor
    norm: tuple[Any, ...]
    tables: tuple[Tensor, Tensor]
    transform: tuple[Any, ...]

    def args(self, op: Op) -> tuple[Any, ...]:
        return (
            self.h,
            *(self.norm if op.norm else ()),
            *(self.tables if op.static else ()),
            *self.transform,
        )


def problem(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    kind: str = "layer",
    modulated: int = 0,
    affine: bool = False,
    keep: bool = False,
    transformed: bool = True,
    order: int = 1,
    bits: int = 8,
    seed: int = 0,
) -> Problem:
    """modulated: rows of the modulation, 0 for none."""
    g = torch.Generator().manual_seed(seed)
    k = shape[-1]
    parameter_dtype = torch.float32 if dtype == torch.float64 else dtype

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(parameter_dtype)

    # As diffusers makes it: chunks of one tensor, so that rows are not contiguous.
    scale, shift = random(modulated, 2 * k).chunk(2, 1) if modulated else (None, None)
    weight, bias = (random(k), random(k)) if affine else (None, None)
    signs = (torch.randint(0, 2, (k,), generator=g) * 2 - 1).to(torch.int8) if order > 1 else None
    vectors = (torch.randn(3, k, generator=g), torch.rand(k, generator=g) + 0.5) if transformed else (None, None)
    return Problem(
        h=(torch.randn(*shape, generator=g) * 2 + 1).to(dtype),
        norm=(kind, 1e-6, weight, bias, scale, shift, keep),
        tables=(
            torch.rand(3, generator=g) * 0.05 + 0.02,
            torch.randint(-20, 20, (3,), dtype=torch.int32, generator=g),
        ),
        transform=(torch.randint(0, 3, (1,), generator=g), *vectors, bits, signs, order),
    )


def check(op: Op, p: Problem, results: Any) -> None:
    results = results if isinstance(results, tuple) else (results,)
    plan = op.plan(*p.args(op)[1:])
    x = exact_input(p.h, plan)
    check_rounded(results[: 1 if op.static else 2], exact_transform(x, plan.transform), plan.rounding, p.transform[0])
    if not op.norm:
        assert len(results) == (1 if op.static else 2)
        return
    kept = results[-1]
    assert kept.dtype == p.h.dtype
    if not p.norm[-1]:
        assert kept.shape == (0,)
        return
    # Twice the unit roundoff of h's dtype: the interpreter cuts off bits where a GPU rounds. 1e-7: fp16 has no less.
    epsilon = torch.finfo(p.h.dtype).eps
    assert kept.shape == p.h.shape and kept.is_contiguous()
    assert ((kept.double() - x.value).abs() <= x.error + epsilon * (x.value.abs() + x.error) + 1e-7).all()


@every_op
@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(1, 3),
    tokens=st.integers(1, 3),
    k=st.sampled_from([1, 2, 7, 36, 48, 72, 130]),
    dtype=dtypes,
    kind=st.sampled_from(["layer", "rms"]),
    modulation=st.sampled_from(["none", "all", "sample", "token"]),
    flags=st.tuples(*[st.booleans()] * 4),
    bits=st.integers(2, 8),
    seed=seeds,
)
def test_every_form_rounds_to_the_nearest_integer(
    every_form: EveryForm,
    op: Op,
    samples: int,
    tokens: int,
    k: int,
    dtype: torch.dtype,
    kind: str,
    modulation: str,
    flags: tuple[bool, ...],
    bits: int,
    seed: int,
) -> None:
    affine, keep, transformed, rotated = flags
    order = {36: 36, 48: 16, 72: 8, 130: 2}.get(k, 1) if rotated else 1
    modulated = {"none": 0, "all": 1, "sample": samples, "token": samples * tokens}[modulation]
    p = problem(
        samples,
        tokens,
        k,
        dtype=dtype,
        kind=kind,
        modulated=modulated,
        affine=affine,
        keep=keep,
        transformed=transformed,
        order=order,
        bits=bits,
        seed=seed,
    )
    before = p.h.clone()
    for results in every_form(op.op, op.launcher, *p.args(op)).values():
        check(op, p, results)
    check(op, p, apply_plan(p.h, op.plan(*p.args(op)[1:])))
    assert torch.equal(p.h, before)


def test_the_reference_is_what_diffusers_computes() -> None:
    p = problem(2, 3, 24, modulated=2, affine=True, keep=True)
    kind, eps, weight, bias, scale, shift, _ = p.norm
    results = norm_quantize_static(*p.args(OPS[0]))
    x = F.layer_norm(p.h, (24,), weight, bias, eps) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(results[1], x, rtol=1e-5, atol=1e-5)
    # x is off by rounding errors of 2^-20, and no number of this problem is that close to a half.
    assert torch.equal(results[0], quantize.quantize_static_reference(x, *p.tables, *p.transform))
    gelu = F.gelu(p.h, approximate="tanh")
    expected = quantize.quantize_static_reference(gelu, *p.tables, *p.transform)
    assert torch.equal(gelu_quantize_static(*p.args(OPS[2])), expected)


def test_a_large_mean_does_not_cancel(every_form: EveryForm) -> None:
    # A variance by E[h^2] - E[h]^2 would lose all digits here.
    p = problem(1, 4, 96, keep=True)
    p = Problem(p.h + 3000, p.norm, p.tables, p.transform)
    for results in every_form(norm_quantize_dynamic, NORM_OPS[1].launcher, *p.args(NORM_OPS[1])).values():
        check(NORM_OPS[1], p, results)
        assert (results[2].double().std() - 1).abs() < 0.01


@every_norm_op
@pytest.mark.parametrize("kept", ["scale", "shift"])
def test_half_a_modulation(every_form: EveryForm, op: Op, kept: str) -> None:
    p = problem(2, 3, 20, modulated=2)
    norm = list(p.norm)
    norm[5 if kept == "scale" else 4] = None
    p = Problem(p.h, tuple(norm), p.tables, p.transform)
    for results in every_form(op.op, op.launcher, *p.args(op)).values():
        check(op, p, results)


@every_op
def test_empty_batches_and_constant_rows(every_form: EveryForm, op: Op) -> None:
    p = problem(2, 0, 8, keep=True)
    for results in every_form(op.op, op.launcher, *p.args(op)).values():
        results = results if isinstance(results, tuple) else (results,)
        assert results[0].shape == (2, 0, 8) and all(t.numel() == 0 for t in results)
    p = problem(1, 2, 8, transformed=False)
    p = Problem(torch.zeros_like(p.h), p.norm, p.tables, p.transform)
    for results in every_form(op.op, op.launcher, *p.args(op)).values():
        check(op, p, results)


@every_op
@pytest.mark.parametrize("at_once", [1, 100, 250, 600])
def test_pieces_of_samples_and_of_tokens(monkeypatch: pytest.MonkeyPatch, op: Op, at_once: int) -> None:
    p = problem(3, 5, 40, modulated=3, keep=True, order=8)
    expected = op.op(*p.args(op))
    monkeypatch.setattr(_quantize_rows, "_VALUES_AT_ONCE", at_once)
    results = op.op(*p.args(op))
    check(op, p, results)
    if isinstance(results, Tensor):
        results, expected = (results,), (expected,)
    # A rotation by matrix products may sum in another order when there are fewer rows.
    assert (results[0].int() - expected[0].int()).abs().max() <= 1


@pytest.mark.usefixtures("guarded_outputs")
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@every_op
def test_neighbours_in_memory_are_neither_read_nor_written(every_form: EveryForm, op: Op, poison: float) -> None:
    p = problem(1, 6, 36, modulated=2, affine=True, keep=True, order=36)
    buffer = torch.full((10, 60), poison)
    buffer[2:8, 5:41] = p.h[0]
    modulation = torch.full((4, 90), poison)
    modulation[1:3, 3:39], modulation[1:3, 45:81] = p.norm[4], p.norm[5]
    norm = (*p.norm[:4], modulation[1:3, 3:39], modulation[1:3, 45:81], p.norm[6])
    p = Problem(buffer[2:8, 5:41], norm, p.tables, p.transform)
    before = buffer.clone()
    for results in every_form(op.op, op.launcher, *p.args(op)).values():
        check(op, p, results)
    assert torch.equal(buffer.nan_to_num(), before.nan_to_num())


@every_op
def test_opcheck(op: Op) -> None:
    for keep in (True, False):
        p = problem(2, 3, 16, modulated=2, affine=True, keep=keep, order=4)
        torch.library.opcheck(op.op.op, p.args(op))
    p = problem(2, 3, 16, dtype=torch.bfloat16, kind="rms", transformed=False)
    torch.library.opcheck(op.op.op, p.args(op))


@every_op
@pytest.mark.parametrize("order", [1, 8])
def test_new_sizes_do_not_recompile(op: Op, order: int) -> None:
    def problem_of(tokens: int) -> Problem:
        return problem(2, tokens, 40, modulated=2, keep=True, order=order, seed=tokens)

    compiled = torch.compile(op.op, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(*problem_of(11).args(op))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (12, 5, 70):
            p = problem_of(tokens)
            check(op, p, compiled(*p.args(op)))


@every_norm_op
def test_bad_arguments_say_what_was_given(op: Op) -> None:
    p = problem(2, 3, 16, modulated=2, affine=True)
    for launcher in (op.op, op.launcher):
        for index, value, message in (
            (0, "batch", r"kind: expected one of \('layer', 'rms'\), got 'batch'"),
            (2, torch.ones(15), r"weight: expected .*\[16\], got float32 \[15\]"),
            (3, torch.ones(16).int(), r"bias: expected .*\[16\], got int32 \[16\]"),
            (4, torch.ones(16), r"modulation_scale: expected .*\[R, 16\], got float32 \[16\]"),
            (4, torch.ones(4, 16), r"R divides the 6 rows of h .*, got \[4, 16\]"),
            (5, torch.ones(3, 16), r"modulation_shift: .* the same in scale and shift, got \[3, 16\]"),
            (5, torch.ones(0, 16), r"modulation_shift: .* got \[0, 16\]"),
        ):
            norm = list(p.norm)
            norm[index] = value
            with pytest.raises(ValueError, match=message):
                launcher(*Problem(p.h, tuple(norm), p.tables, p.transform).args(op))
        with pytest.raises(ValueError, match=r"expected float \[..., K\] with K > 0, got torch.int32"):
            launcher(p.h.int(), *p.args(op)[1:])


def test_tables_have_one_row_or_as_many_as_the_others() -> None:
    h, transform = torch.randn(6, 16), (torch.tensor([0]), None, None, 8)
    tables = torch.ones(2), torch.zeros(3, dtype=torch.int32)
    norm = ("layer", 1e-6, None, None, None, None, False)
    for op in OPS:
        if op.static:
            for launcher in (op.op, op.launcher):
                with pytest.raises(ValueError, match="same number of timestep groups, got scale 2, zero_point 3"):
                    launcher(h, *(norm if op.norm else ()), *tables, *transform)


@needs_gpu
@pytest.mark.gpu
@every_op
@pytest.mark.parametrize(("k", "order"), [(1152, 64), (1152, 1152), (4608, 4608), (3072, 256), (2240, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_sizes_on_the_gpu(op: Op, k: int, order: int, dtype: torch.dtype) -> None:
    for kind in ("layer", "rms"):
        p = problem(2, 300, k, dtype=dtype, kind=kind, modulated=2, keep=True, order=order)
        results = op.op(*(t.cuda() if isinstance(t, Tensor) else t for t in p.args(op)))
        results = results if isinstance(results, tuple) else (results,)
        check(op, p, tuple(t.cpu() for t in results))
