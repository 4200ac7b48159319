# SPDX-License-Identifier: Apache-2.0
"""int8 activations times int8 weights, accumulated in int32, and the epilogue of _epilogue.py."""
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
from torch import Tensor

from ._epilogue import FINISH_SCHEMA, Epilogue, store_output
from ._gemm import check_integer_operands, empty_output, launch, tile_index
from ._int_matmul import compiles_on_cpu, int_mm_caveat, linear_compiled, linear_cpu
from ._library import define_op
from ._triton import jit, tl

__all__ = ["INTEGER_SCHEMA", "integer_fake", "linear_w8a8"]

# Of every op with an integer input; those after the weight in the order of Epilogue.
INTEGER_SCHEMA = (
    "(Tensor xq, Tensor weight, Tensor weight_scale, Tensor? input_scale, Tensor? input_zero_point,"
    f" Tensor? weight_sum, Tensor? bias, Tensor group, ScalarType out_dtype, {FINISH_SCHEMA}) -> Tensor"
)


def linear_w8a8_reference(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    """residual + gate * activation(((xq - zero_point[g]) W^T) * input_scale * weight_scale + bias[g]).

    xq: [..., K] int8.   weight: [N, K] int8.   parameters: weight_scale, input_scale, input_zero_point, weight_sum,
    bias, group, out_dtype, gate, residual, activation: see `Epilogue`. With a zero point the input scale is static, a
    table over timestep groups; without one it is dynamic, [...] fp32, one a row.
    Returns [..., N] of out_dtype; torch.int32 asks for the bare integer (xq - zero_point) W^T.
    """
    # fp64 holds these integers exactly, below 2^53, and unlike int64 it has a matmul on every device.
    return Epilogue(*parameters).apply(xq.double() @ weight.double().t())


def _linear_w8a8_cpu(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    epilogue = Epilogue(*parameters)
    check_integer_operands(xq, weight, torch.int8, epilogue)
    return linear_cpu("linear_w8a8", xq, weight, epilogue)


def _linear_w8a8_compiled(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    if not compiles_on_cpu(xq):
        result: Tensor = linear_w8a8.op(xq, weight, *parameters)  # type: ignore[attr-defined]
        return result
    return linear_compiled(xq, weight, Epilogue(*parameters))


# Kernel


@jit("M")
def _linear_w8a8_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    epilogue,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    GELU: tl.constexpr,
):
    """One program computes a [BLOCK_M, BLOCK_N] tile of y. Both operands are read along K, as they are stored."""
    pid_m, pid_n = tile_index(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the end read other rows, which is cheaper than masking them; the store leaves them out.
    x_ptrs = x_ptr + (offs_m % M).to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
    weight_ptrs = weight_ptr + (offs_n % N).to(tl.int64)[None, :] * stride_wn + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_k[None, :] < K - k, other=0)
            weight = tl.load(weight_ptrs, mask=offs_k[:, None] < K - k, other=0)
        acc = tl.dot(x, weight, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    store_output(acc, offs_m[:, None], offs_n[None, :], y_ptr, epilogue, M, N, GELU)


# Launchers


def _linear_w8a8_triton(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    epilogue = Epilogue(*parameters)
    check_integer_operands(xq, weight, torch.int8, epilogue)
    return launch("linear_w8a8", _linear_w8a8_kernel, "linear_w8a8", xq, weight, epilogue)


# Registration


def integer_fake(xq: Tensor, weight: Tensor, *parameters: Any) -> Tensor:
    return empty_output(xq, weight, Epilogue(*parameters).out_dtype)


linear_w8a8 = define_op(
    "linear_w8a8" + INTEGER_SCHEMA,
    linear_w8a8_reference,
    fake=integer_fake,
    cpu=_linear_w8a8_cpu,
    triton=_linear_w8a8_triton,
    compiled=_linear_w8a8_compiled,
    cpu_caveat=int_mm_caveat,
)
