# SPDX-License-Identifier: Apache-2.0
"""y[M, N] = x[M, K] W[N, K]^T alone: ours against bf16, cuBLASLt's or oneDNN's int8, and fp8.

Ours, bf16 and fp8 include scales and bias and write bf16; torch._int_mm writes bare int32. Inputs of the integer
products are integers already: what quantizing costs is in the step benchmark.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_dq.benchmark.compiling import compile_options
from diffusers_dq.benchmark.failures import reason_of
from diffusers_dq.benchmark.graphs import captured
from diffusers_dq.benchmark.our_ops import OurInputs, Product, large_products, small_products
from diffusers_dq.benchmark.results import Row
from diffusers_dq.benchmark.session import Part
from diffusers_dq.benchmark.settings import Settings
from diffusers_dq.benchmark.timing import Call, Spread, interleave

INT_MM = "torch._int_mm"
SMALL_M = 64  # rows below which a product is a modulation's: memory-bound, weight-only
_COPIES = 8  # weights that a replay goes through, so that each is cold, as in a model


@dataclass(frozen=True)
class Gemm:
    """m rows, n out_features, k in_features.   model: where the shape is from."""

    model: str
    m: int
    n: int
    k: int

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def operations(self) -> int:
        return 2 * self.m * self.n * self.k


_WIDTH, _FLUX = 1152, 3072
_TRANSFORMER = ((_WIDTH, _WIDTH), (3 * _WIDTH, _WIDTH), (4 * _WIDTH, _WIDTH), (_WIDTH, 4 * _WIDTH))
_FLUX_LINEARS = ((_FLUX, _FLUX), (4 * _FLUX, _FLUX), (_FLUX, 4 * _FLUX), (_FLUX, 5 * _FLUX))

LARGE = (
    *(Gemm("DiT-XL/2 512, batch 16 with guidance", 32768, n, k) for n, k in _TRANSFORMER),
    *(Gemm("FLUX.1 1024", 4608, n, k) for n, k in _FLUX_LINEARS),
    *(Gemm("PixArt-Sigma 1024 with guidance", 8192, n, k) for n, k in _TRANSFORMER),
    *(Gemm("DiT-XL/2 256, batch 8 with guidance", 4096, n, k) for n, k in _TRANSFORMER),
    *(Gemm("STDiT 16x512x512", 16384, n, k) for n, k in _TRANSFORMER[:1] + _TRANSFORMER[2:3]),
)
SMALL = (
    *(Gemm("DiT-XL/2 modulation", m, 6 * _WIDTH, _WIDTH) for m in (2, 32)),
    *(Gemm("FLUX.1 modulation", m, 6 * _FLUX, _FLUX) for m in (1, 8)),
)
CPU_LARGE = tuple(Gemm("DiT-XL/2", m, n, k) for m in (512, 4096) for n, k in (_TRANSFORMER[0], *_TRANSFORMER[2:]))
CPU_SMALL = (Gemm("DiT-XL/2 modulation", 2, 6 * _WIDTH, _WIDTH),)


def peak_part(size: int) -> Part:
    """The measured int8 peak, by which fractions and rooflines are reckoned in its run."""
    gemm = Gemm("square", size, size, size)
    definition = f"the better of {INT_MM} and our W8A8 static for M = N = K = {size}, in this run"

    def measure(settings: Settings, peak: float | None) -> dict[str, Any]:
        rows = _measure(gemm, settings, None, ("bf16", INT_MM, "W8A8 static"))
        speeds = {row["name"]: row["tops"] for row in rows if "tops" in row}
        int8 = [speed for name, speed in speeds.items() if name != "bf16"]
        if not int8:
            raise RuntimeError("; ".join(f"{row['name']}: {row['failed']}" for row in rows if "failed" in row))
        return {"rows": rows, "int8_tops": max(int8), "bf16_tops": speeds.get("bf16"), "definition": definition}

    return Part("peak", gemm.name, asdict(gemm), measure)


def gemm_part(gemm: Gemm) -> Part:
    return Part("gemm", gemm.name, asdict(gemm), lambda settings, peak: {"rows": _measure(gemm, settings, peak, None)})


def _measure(gemm: Gemm, settings: Settings, peak: float | None, only: tuple[str, ...] | None) -> list[Row]:
    copies = _COPIES if settings.device == "cuda" else 1
    calls: dict[str, Call] = {}
    failures: dict[str, str] = {}
    for name, product in contestants(gemm, settings, copies).items():
        if only is not None and name not in only:
            continue
        try:
            calls[name] = _prepared(product, copies, settings)
        except Exception as error:
            failures[name] = reason_of(error)
    times = interleave(
        calls,
        settings.timer(cold_cache=True),
        rounds=settings.rounds,
        seed=settings.seed,
        max_seconds=settings.max_seconds,
    )
    failures |= times.failures
    spreads = {name: Spread.of(seconds, copies) for name, seconds in times.seconds.items()}
    return [_row(gemm, name, spread, spreads, peak) for name, spread in spreads.items()] + [
        {"name": name, "failed": reason} for name, reason in failures.items()
    ]


def _prepared(product: Product, copies: int, settings: Settings) -> Call:
    """Warm, and on a GPU one graph: kernels are timed, not their launches."""

    def call() -> None:
        for i in range(copies):
            product(i)

    for _ in range(2):
        call()
    return captured(call) if settings.device == "cuda" else call


def _row(gemm: Gemm, name: str, spread: Spread, spreads: dict[str, Spread], peak: float | None) -> Row:
    tops = gemm.operations / spread.median_ms / 1e9
    row: Row = {"name": name, **asdict(spread), "tops": tops}
    if peak is not None:
        row["of_int8_peak"] = tops / peak
    for label, base in (("times_bf16_compiled", "bf16 compiled"), ("times_int_mm", INT_MM)):
        if base in spreads:
            row[label] = spreads[base].median_ms / spread.median_ms
    return row


def contestants(gemm: Gemm, settings: Settings, copies: int) -> dict[str, Product]:
    """Name -> product with the i-th of `copies` random weights."""
    device = settings.device
    generator = torch.Generator(device).manual_seed(settings.seed)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return torch.randint(low, high, shape, dtype=dtype, device=device, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).bfloat16()

    x, bias = normal(gemm.m, gemm.k), normal(gemm.n)
    half = [normal(gemm.n, gemm.k) for _ in range(copies)]
    inputs = OurInputs(
        x,
        integers(-127, 128, gemm.m, gemm.k),
        [integers(-127, 128, gemm.n, gemm.k) for _ in range(copies)],
        [integers(0, 256, gemm.n, gemm.k // 2, dtype=torch.uint8) for _ in range(copies)],
    )
    compiled = torch.compile(_linear, **compile_options(settings, dynamic=False))
    found: dict[str, Product] = {
        "bf16": lambda i: F.linear(x, half[i], bias),
        "bf16 compiled": lambda i: compiled(x, half[i], bias),
    }
    if device == "cpu":
        full, full_bias, full_x = [weight.float() for weight in half], bias.float(), x.float()
        found["fp32"] = lambda i: F.linear(full_x, full[i], full_bias)
    if gemm.m < SMALL_M:
        return found | small_products(inputs)
    found |= large_products(inputs)
    if device == "cpu":  # where Inductor fuses our epilogue; on a GPU it is part of the kernel
        fused = large_products(inputs, lambda product: torch.compile(product, **compile_options(settings)))
        found |= {f"{name} compiled": product for name, product in fused.items()}
    # cuBLASLt wants the second operand column-major, which is a linear's weight as it is stored, transposed
    found[INT_MM] = lambda i: torch._int_mm(inputs.xq, inputs.weights[i].t())
    found["torch._scaled_mm fp8"] = _fp8_product(x, half, bias)
    return found


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def _fp8_product(x: Tensor, weights: list[Tensor], bias: Tensor) -> Callable[[int], Tensor]:
    """Row-wise scales. A device without it raises when it is first called."""

    def rounded(tensor: Tensor) -> tuple[Tensor, Tensor]:
        scale = tensor.abs().amax(1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
        return (tensor.float() / scale).to(torch.float8_e4m3fn), scale

    (xq, x_scale), quantized = rounded(x), [rounded(weight) for weight in weights]

    def product(i: int) -> Tensor:
        weight, scale = quantized[i]
        return torch._scaled_mm(
            xq, weight.t(), x_scale, scale.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return product
