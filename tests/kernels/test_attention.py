# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_dq_kernels import _library, attention
from diffusers_dq_kernels.attention import attention_int8

EveryForm = Callable[..., dict[str, Tensor]]
Sizes = tuple[int, int, int, int, int]  # batch, heads, queries, keys, width

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

sizes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 70), st.integers(1, 150), st.integers(1, 80))


@dataclass(frozen=True)
class Problem:
    query: Tensor
    key: Tensor
    value: Tensor
    query_scale: Tensor
    key_scale: Tensor
    value_scale: Tensor
    probability_scale: Tensor
    softmax_scale: float
    bits: int

    @property
    def args(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def forms(self, every_form: EveryForm) -> dict[str, Tensor]:
        return every_form(attention_int8, attention._attention_int8_triton, *self.args)

    def integers(self) -> tuple[Tensor, ...]:
        """q, k, v as int64."""
        half = 1 << (self.bits - 1)
        operands = zip(self.args[:3], self.args[3:6], strict=True)
        return tuple(torch.round(x.float() / scale).clamp(-half, half - 1).long() for x, scale in operands)


def heads(*shape: int, seed: int) -> Tensor:
    """[B, H, N, D] as a projection of [B, N, H D] gives it."""
    b, h, n, d = shape
    return torch.randn(b, n, h, d, generator=torch.Generator().manual_seed(seed)).transpose(1, 2)


def problem(
    b: int, h: int, n: int, keys: int, d: int, bits: int = 8, seed: int = 0, sharpness: float = 1.0
) -> Problem:
    top = (1 << bits) - 1
    p = Problem(
        query=heads(b, h, n, d, seed=seed) * sharpness,
        key=heads(b, h, keys, d, seed=seed + 1),
        value=heads(b, h, keys, d, seed=seed + 2),
        query_scale=torch.tensor([6.0 * sharpness / top]),
        key_scale=torch.tensor([6.1 / top]),
        value_scale=torch.tensor([6.2 / top]),
        probability_scale=torch.ones(1),
        softmax_scale=d**-0.5,
        bits=bits,
    )
    if p.query.numel() == 0:
        return p
    return replace(p, probability_scale=(probabilities(p).amax() * 0.9 / top).float()[None])


def probabilities(p: Problem) -> Tensor:
    q, k, _ = p.integers()
    logits = (q @ k.transpose(-1, -2)).double() * (p.query_scale.double() * p.key_scale.double() * p.softmax_scale)
    return logits.softmax(-1)


def allowed(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The result in fp64, how far fp32 may be from it, and which levels [B, H, N, L] fp32 leaves undecided.

    All integers are exact but the level of a probability so close to the middle between two that the rounding errors
    of the softmax decide: those of a logit and of its scale, relative to the largest, and of a sum over the keys in
    blocks of at least 32. Such a level may be one off, which moves the output by the value of its key.
    """
    q, k, v = p.integers()
    largest = (q @ k.transpose(-1, -2)).abs().amax() * (p.query_scale * p.key_scale).double() * p.softmax_scale
    error = 2**-23 * (8 + 4 * largest + k.shape[2] / 32)
    t = probabilities(p) / p.probability_scale.double()
    top = (1 << p.bits) - 1
    undecided = ((t - t.floor() - 0.5).abs() <= error * t) & (t < top)
    unit = p.value_scale.double() * p.probability_scale.double()
    exact = (torch.round(t).clamp(max=top).long() @ v).double() * unit
    return exact, undecided.double() @ v.abs().double() * unit + 2**-22 * exact.abs(), undecided


@pytest.fixture(params=["one pass", "two passes"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two passes":
        monkeypatch.setattr(attention, "_MOST_KEYS_IN_ONE_PASS", 0)


@pytest.mark.usefixtures("passes")
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=sizes, bits=st.sampled_from((8, 8, 6, 4, 2)), seed=st.integers(0, 999), sharpness=st.sampled_from((1, 0.2, 8))
)
def test_every_form_is_exact_up_to_undecided_levels(
    every_form: EveryForm, size: Sizes, bits: int, seed: int, sharpness: float
) -> None:
    p = problem(*size, bits=bits, seed=seed, sharpness=sharpness)
    exact, tolerance, _ = allowed(p)
    reference = attention.attention_int8_reference(*p.args)
    for form, y in {"reference": reference, **p.forms(every_form)}.items():
        assert y.shape == p.query.shape and y.dtype == torch.float32
        assert ((y.double() - exact).abs() <= tolerance).all(), form


def test_few_levels_are_undecided() -> None:
    """Otherwise the tolerance above would hide errors."""
    for sharpness in (0.2, 1, 8):
        assert allowed(problem(2, 2, 64, 100, 72, sharpness=sharpness))[2].double().mean() < 0.01


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_the_semantics_are_those_of_separate_fp32_steps(bits: int) -> None:
    """Attention written out with matrices of integers held as fp32, as PTQ4DiT's code does it: equal, not close."""
    p = problem(2, 3, 50, 60, 24, bits=bits)
    half = 1 << (bits - 1)

    def rounded(x: Tensor, scale: Tensor, zero_point: int = 0) -> Tensor:
        q = torch.clamp(torch.round(x / scale) + zero_point, -half, half - 1).to(torch.int8)
        return q.float() - zero_point

    q, k, v = (rounded(x, scale) for x, scale in zip(p.args[:3], p.args[3:6], strict=True))
    logits = (q @ k.transpose(-1, -2)) * (p.query_scale * p.key_scale * p.softmax_scale)
    levels = rounded(logits.softmax(-1), p.probability_scale, zero_point=-half)
    expected = (levels @ v) * (p.value_scale * p.probability_scale)
    assert torch.equal(attention_int8(*p.args), expected)


def exact_problem(query: Tensor, key: Tensor, value: Tensor, probability_scale: float) -> Problem:
    """Of operands that are integers, with scales that are powers of two: the output is the integer of the product."""
    one, scale = torch.ones(1), torch.tensor([probability_scale])
    return Problem(query, key, value / scale, one, one, 1 / scale, scale, 1.0, 8)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("keys", [40, 64])
def test_one_hot_rows_pick_a_value(every_form: EveryForm, keys: int) -> None:
    """Every query meets its own key alone, at the top level whether 1 is within the range of the levels or not."""
    key = torch.eye(keys)[None, None] * 100
    value = torch.randint(-128, 128, (1, 1, keys, keys)).float()
    for probability_scale in (2.0**-7, 2.0**-8, 2.0**-20):
        level = min(255, round(1 / probability_scale))
        for form, y in exact_problem(key, key, value, probability_scale).forms(every_form).items():
            assert torch.equal(y, level * value), (form, probability_scale)


@pytest.mark.parametrize("keys", [100, 256, 700, 1024])
@pytest.mark.parametrize("largest", [127.0, -128.0])
def test_uniform_rows_over_many_keys(every_form: EveryForm, keys: int, largest: float) -> None:
    """All values equal: 128 times their sum, left out or over keys that do not exist, would be seen."""
    p = exact_problem(
        torch.zeros(1, 1, 3, 8), heads(1, 1, keys, 8, seed=0), torch.full((1, 1, keys, 8), largest), 2**-17
    )
    level = min(255, round(2**17 / keys))
    for form, y in p.forms(every_form).items():
        assert (y == level * largest * keys).all(), form


@pytest.mark.parametrize("keys", [515, 4100])
def test_sums_beyond_fp32_are_exact(every_form: EveryForm, keys: int) -> None:
    """All levels at the top, sums above 2^24: exact integers rounded once, in every form."""
    g = torch.Generator().manual_seed(0)
    value = torch.randint(100, 128, (1, 2, keys, 7), generator=g).float()
    p = exact_problem(torch.zeros(1, 2, 3, 7), torch.zeros(1, 2, keys, 7), value, 2.0**-40)
    expected = (255 * value.long().sum(2, keepdim=True)).float().expand(1, 2, 3, 7)
    for form, y in p.forms(every_form).items():
        assert torch.equal(y, expected), form


@pytest.mark.parametrize("logits", [1, 50, 1000, 100_000])
def test_large_products_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch, logits: int) -> None:
    p = problem(2, 3, 20, 40, 8)
    whole = attention_int8(*p.args)
    sizes, matmul = [], attention._exact_matmul

    def recorded(a: Tensor, b: Tensor, largest_product: int) -> Tensor:
        sizes.append(a.shape[0] * a.shape[1] * max(a.shape[2], b.shape[2]))
        return matmul(a, b, largest_product)

    monkeypatch.setattr(attention, "_exact_matmul", recorded)
    monkeypatch.setattr(attention, "_LOGITS_AT_ONCE", logits)
    torch.testing.assert_close(attention_int8(*p.args), whole, rtol=1e-6, atol=1e-6)
    assert max(sizes) <= max(logits, 40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_memory_layouts(every_form: EveryForm, dtype: torch.dtype) -> None:
    p = problem(2, 3, 20, 30, 12)
    p = replace(p, query=p.query.to(dtype), key=p.key.to(dtype), value=p.value.to(dtype))
    exact, tolerance, _ = allowed(p)
    columns = replace(
        p, query=p.query.mT.contiguous().mT, key=p.key.mT.contiguous().mT, value=p.value.mT.contiguous().mT
    )
    contiguous = replace(p, query=p.query.contiguous(), key=p.key.contiguous(), value=p.value.contiguous())
    for layout in (p, columns, contiguous):
        for form, y in layout.forms(every_form).items():
            assert y.dtype == dtype and y.transpose(1, 2).is_contiguous()
            # a whole eps: the interpreter cuts off bits where a GPU rounds. fp64 outputs carry fp32 values.
            assert ((y.double() - exact).abs() <= tolerance + torch.finfo(dtype).eps * exact.abs()).all(), form


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (0, 2, 3, 4, 8), (2, 2, 0, 5, 8), (1, 1, 5, 33, 200), (1, 1, 3, 9, 300)]
)
def test_awkward_sizes(every_form: EveryForm, shape: Sizes) -> None:
    p = problem(*shape)
    for form, y in p.forms(every_form).items():
        assert y.shape == p.query.shape
        if y.numel():
            exact, tolerance, _ = allowed(p)
            assert ((y.double() - exact).abs() <= tolerance).all(), form


def test_heads_too_wide_for_the_kernel_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    _library.announce.cache_clear()
    p = problem(1, 1, 3, 9, 257)
    assert torch.equal(attention._attention_int8_triton(*p.args), attention_int8(*p.args))
    assert caplog.messages == ["attention_int8: no tile for heads wider than 256: plain torch, slower"]


@pytest.mark.usefixtures("guarded_outputs", "passes")
@pytest.mark.filterwarnings("error::RuntimeWarning")  # the interpreter's, of a NaN that becomes an integer
@pytest.mark.parametrize("keys", [37, 64])
@pytest.mark.parametrize("d", [12, 72])
def test_neighbours_in_memory_are_neither_read_nor_written(every_form: EveryForm, keys: int, d: int) -> None:
    p = problem(2, 2, 21, keys, d)
    expected = p.forms(every_form)

    def surrounded(inner: Tensor) -> tuple[Tensor, Tensor]:
        b, h, n, width = inner.shape
        around = torch.full((b + 2, h + 2, n + 4, width + 32), float("nan"))
        view = around[1:-1, 1:-1, 2:-2, 16:-16]
        view.copy_(inner)
        return around, view

    arounds, views = zip(*(surrounded(x) for x in p.args[:3]), strict=True)
    before = [around.clone() for around in arounds]
    for form, y in replace(p, query=views[0], key=views[1], value=views[2]).forms(every_form).items():
        assert torch.equal(y, expected[form])
    for around, was in zip(arounds, before, strict=True):
        assert torch.equal(around.nan_to_num(7), was.nan_to_num(7))


def test_opcheck() -> None:
    for shape in ((2, 3, 20, 30, 12), (1, 1, 1, 1, 1), (1, 2, 1, 300, 8)):
        torch.library.opcheck(attention_int8.op, problem(*shape).args)


def test_dynamic_shapes_compile_once() -> None:
    def run(*args: Any) -> Tensor:
        y: Tensor = attention_int8(*args)
        return y.transpose(1, 2).flatten(2) * 2

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(*problem(5, 4, 20, 30, 12).args)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for b, n, keys in ((2, 20, 30), (3, 7, 11)):
            p = replace(problem(b, 4, n, keys, 12), softmax_scale=12**-0.5)
            assert torch.equal(compiled(*p.args), run(*p.args))


@pytest.mark.parametrize("launcher", [attention_int8, attention._attention_int8_triton])
def test_bad_arguments_say_what_was_given(launcher: Callable[..., Tensor]) -> None:
    p = problem(2, 3, 20, 30, 12)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"query": p.query.int()}, r"query: expected float32 or .* \[B, H, N, D\], got int32 \[2, 3, 20, 12\]"),
        ({"query": p.query[0]}, r"query: .*\[B, H, N, D\], got float32 \[3, 20, 12\]"),
        ({"query": p.query[..., :0], "key": p.key[..., :0], "value": p.value[..., :0]}, r"expected D > 0, got \[2, 3"),
        ({"key": p.key[:, :2]}, r"key: expected .* \[2, 3, L, 12\], got float32 \[2, 2, 30, 12\]"),
        ({"key": p.key[..., :7]}, r"key: expected .* \[2, 3, L, 12\], got float32 \[2, 3, 30, 7\]"),
        ({"value": p.value[:, :, :29]}, r"value: expected .* \[2, 3, 30, 12\], got float32 \[2, 3, 29, 12\]"),
        ({"key": p.key[:, :, :0], "value": p.value[:, :, :0]}, r"expected 1 to 65536 keys, got \[2, 3, 0, 12\]"),
        ({"key_scale": torch.ones(3)}, r"key_scale: expected float32 \[1\], got float32 \[3\]"),
        ({"value_scale": torch.ones(())}, r"value_scale: expected float32 \[1\], got float32 \[\]"),
        ({"probability_scale": torch.ones(1).half()}, r"probability_scale: expected float32 \[1\], got float16 \[1\]"),
        ({"softmax_scale": -1.0}, "softmax_scale: expected more than 0, got -1.0"),
        ({"bits": 9}, "bits: expected 2 to 8, got 9"),
    )
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            launcher(*replace(p, **change).args)
    long = torch.zeros(1, 1, 1, 1).expand(1, 1, (1 << 16) + 1, 1)
    with pytest.raises(ValueError, match=r"expected 1 to 65536 keys, got \[1, 1, 65537, 1\]"):
        launcher(*replace(p, query=torch.zeros(1, 1, 1, 1), key=long, value=long).args)


def on_gpu(p: Problem) -> Problem:
    return replace(p, **{name: value.cuda() for name, value in vars(p).items() if isinstance(value, Tensor)})


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 72, 128, 256])
@pytest.mark.parametrize("keys", [120, 256, 1000, 4096])
def test_every_tile_on_the_gpu(d: int, keys: int) -> None:
    p = problem(2, 4, 500, keys, d)
    exact, tolerance, _ = allowed(p)
    assert ((attention_int8(*on_gpu(p).args).cpu().double() - exact).abs() <= tolerance).all()


@needs_gpu
@pytest.mark.gpu
def test_a_cuda_graph_follows_its_scales() -> None:
    p = on_gpu(problem(2, 4, 256, 256, 72))
    attention_int8(*p.args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = attention_int8(*p.args)
    for factor in (0.5, 2.0):
        p.key_scale.mul_(factor)
        graph.replay()
        assert torch.equal(y, attention_int8(*p.args))
