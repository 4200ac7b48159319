# SPDX-License-Identifier: Apache-2.0
"""What is timed: an op with random arguments of a size, and the sizes of the linears of known models.

A table of tiles is listed under an op and what follows its product (`Task.table`), and in it an entry under the bucket
of M, N and K (`Task.key`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._epilogue import Epilogue
from .._gemm import table_of
from .._tiles import bucket_of
from ..packing import unpack_int4

__all__ = ["MODELS", "PROBLEMS", "Problem", "Size", "Task", "parse_size"]


class Size(NamedTuple):
    """M rows, N out_features, K in_features.   finish: "", "gelu" or "residual"."""

    m: int
    n: int
    k: int
    finish: str = ""

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}" + (self.finish and f":{self.finish}")


def parse_size(text: str) -> Size:
    """ValueError for sizes that take no tile from a table."""
    shape, _, finish = text.partition(":")
    try:
        m, n, k = map(int, shape.split("x"))
    except ValueError:
        raise ValueError(f"--shapes: expected MxNxK, got {text!r}") from None
    if finish not in ("", "gelu", "residual"):
        raise ValueError(f"--shapes: expected :gelu or :residual after the sizes, got {text!r}")
    if m < 1 or n < 1 or k < 1 or n % 16 or k % 32:
        raise ValueError(f"--shapes: expected N a multiple of 16 and K of 32 (others take a fixed tile), got {text!r}")
    return Size(m, n, k, finish)


@dataclass(frozen=True)
class Problem:
    """How to call an op. weight_only: x is bf16; else int8 with a static scale."""

    bits: int
    weight_only: bool = False

    def arguments(self, size: Size, device: str, exact: bool = False) -> tuple[Any, ...]:
        """Random ones. exact: the result is `expected`, to the bit."""
        g = torch.Generator(device).manual_seed(0)
        m, n, k, finish = size
        x = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device, generator=g)
        bytes_ = torch.randint(-128, 128, (n, k * self.bits // 8), dtype=torch.int8, device=device, generator=g)
        weight = bytes_ if self.bits == 8 else bytes_.view(torch.uint8)
        scale, group = torch.ones(n, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        gate = residual = None
        if finish == "residual" and not exact:
            gate = torch.ones(1, n, dtype=torch.bfloat16, device=device)
            residual = torch.ones(m, n, dtype=torch.bfloat16, device=device)
        last = (gate, residual, "gelu_tanh" if finish == "gelu" and not exact else "none")
        bias = None if exact else torch.ones(1, n, device=device)
        if self.weight_only:
            # exact: sums of whole numbers that fp32 holds
            return (x % 4 if exact else x).bfloat16(), weight, scale, bias, group, *last
        table = (torch.ones(1, device=device), torch.ones(1, dtype=torch.int32, device=device))
        weight_sum = torch.ones(n, dtype=torch.int32, device=device)
        return x, weight, scale, *table, weight_sum, bias, group, torch.int32 if exact else torch.bfloat16, *last

    def expected(self, arguments: tuple[Any, ...]) -> Tensor:
        x, weight = arguments[:2]
        sums = x.double() @ (unpack_int4(weight) if self.bits == 4 else weight).double().t()
        return sums.bfloat16() if self.weight_only else (sums - 1).int()  # zero point and sum of the weight are 1

    def table_of(self, op: str, size: Size) -> str:
        last = (None, torch.ones(0) if size.finish == "residual" else None)
        activation = "gelu_tanh" if size.finish == "gelu" else "none"
        nothing = torch.ones(0)
        epilogue = Epilogue(nothing, None, None, None, None, nothing, torch.bfloat16, *last, activation)
        return table_of(op, size.k, epilogue)


PROBLEMS = {
    "linear_w8a8": Problem(8),
    "linear_w4a8": Problem(4),
    "linear_w8a16": Problem(8, weight_only=True),
    "linear_w4a16": Problem(4, weight_only=True),
}


class Task(NamedTuple):
    op: str
    size: Size

    @property
    def table(self) -> str:
        return PROBLEMS[self.op].table_of(self.op, self.size)

    @property
    def key(self) -> tuple[int, int, int]:
        return bucket_of(self.size.m), self.size.n, self.size.k

    def __str__(self) -> str:
        return f"{self.op} {self.size}"


def _block(m: int, width: int, inner: int) -> tuple[Size, ...]:
    """Query, key and value; attention's output; the two of the feed-forward."""
    return (
        Size(m, width, width),
        Size(m, width, width, "residual"),
        Size(m, inner, width, "gelu"),
        Size(m, width, inner, "residual"),
    )


# Guided models run a batch of two. First the linears of tokens, then those of modulation, which are weight-only.
MODELS: dict[str, tuple[tuple[Size, ...], tuple[Size, ...]]] = {
    "dit-xl-2-256": (_block(2 * 256, 1152, 4608), (Size(2, 6 * 1152, 1152),)),
    "dit-xl-2-512": (_block(2 * 1024, 1152, 4608), (Size(2, 6 * 1152, 1152),)),
    # with 300 tokens of text
    "pixart-sigma-1024": ((*_block(2 * 4096, 1152, 4608), Size(2 * 300, 1152, 1152)), (Size(2, 6 * 1152, 1152),)),
    # Open-Sora 1.0, 16 frames of 256 x 256, with 120 tokens of text
    "stdit": ((*_block(2 * 16 * 256, 1152, 4608), Size(2 * 120, 1152, 1152)), (Size(2, 6 * 1152, 1152),)),
    # FLUX.1 at 1024 x 1024 with 512 tokens of text: blocks of two streams, then blocks of one
    "flux": (
        (
            *_block(4096, 3072, 12288),
            *_block(512, 3072, 12288),
            Size(4608, 3072, 3072),
            Size(4608, 12288, 3072, "gelu"),
            Size(4608, 3072, 15360, "residual"),
        ),
        (Size(1, 6 * 3072, 3072), Size(1, 3 * 3072, 3072)),
    ),
}
