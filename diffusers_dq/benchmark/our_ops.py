# SPDX-License-Identifier: Apache-2.0
"""The only place of the benchmarks that calls the ops of diffusers_dq_kernels directly."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import diffusers_dq_kernels as ops

Product = Callable[[int], Tensor]
Op = Callable[..., Tensor]
_GROUPS = 4  # timestep groups of the static tables: what a calibrated model has


@dataclass(frozen=True)
class OurInputs:
    """x: bf16 [M, K].   xq: int8 [M, K].   weights: int8 [N, K] each.   packed: uint8 [N, K / 2] each."""

    x: Tensor
    xq: Tensor
    weights: list[Tensor]
    packed: list[Tensor]


def large_products(inputs: OurInputs, compiled: Callable[[Any], Any] | None = None) -> dict[str, Product]:
    """Contestant -> product with the i-th weight, into bf16, scales and bias included.

    compiled: torch.compile, where the compiled form of an op is another one (CPU) and shall take part.
    """
    m, n, device = len(inputs.xq), len(inputs.weights[0]), inputs.xq.device
    scale = torch.rand(n, device=device) * 1e-3
    group = torch.zeros(1, dtype=torch.int64, device=device)
    sums = [weight.sum(1, dtype=torch.int32) for weight in inputs.weights]
    packed_sums = [ops.unpack_int4(weight).sum(1, dtype=torch.int32) for weight in inputs.packed]
    table = torch.full((_GROUPS,), 1e-2, device=device)
    zero_point = torch.full((_GROUPS,), 3, dtype=torch.int32, device=device)
    biases = torch.randn(_GROUPS, n, device=device)
    bias = biases[0].bfloat16()
    rows = torch.full((m,), 1e-2, device=device)

    def static(op: Op, weights: list[Tensor], totals: list[Tensor]) -> Product:
        def product(xq: Tensor, weight: Tensor, total: Tensor) -> Tensor:
            return op(xq, weight, scale, table, zero_point, total, biases, group, torch.bfloat16)

        run = compiled(product) if compiled else product
        return lambda i: run(inputs.xq, weights[i], totals[i])

    def dynamic(op: Op, weights: list[Tensor]) -> Product:
        def product(xq: Tensor, weight: Tensor) -> Tensor:
            return op(xq, weight, scale, rows, None, None, bias, group, torch.bfloat16)

        run = compiled(product) if compiled else product
        return lambda i: run(inputs.xq, weights[i])

    return {
        "W8A8 static": static(ops.linear_w8a8, inputs.weights, sums),
        "W8A8 dynamic": dynamic(ops.linear_w8a8, inputs.weights),
        "W4A8 static": static(ops.linear_w4a8, inputs.packed, packed_sums),
        "W4A8 dynamic": dynamic(ops.linear_w4a8, inputs.packed),
    }


def small_products(inputs: OurInputs) -> dict[str, Product]:
    """Weight-only, for the few rows of a modulation linear."""
    n, device = len(inputs.weights[0]), inputs.x.device
    scale = torch.rand(n, device=device) * 1e-3
    group = torch.zeros(1, dtype=torch.int64, device=device)
    bias = torch.randn(n, device=device).bfloat16()
    return {
        "W8A16": lambda i: ops.linear_w8a16(inputs.x, inputs.weights[i], scale, bias, group),
        "W4A16": lambda i: ops.linear_w4a16(inputs.x, inputs.packed[i], scale, bias, group),
    }
