# SPDX-License-Identifier: Apache-2.0
"""Exact products of int8 matrices on a CPU, and the linear layer around one."""

import functools

import torch
from torch import Tensor

from ._arguments import rows_of
from ._epilogue import Epilogue, rows_at
from ._library import announce, define_op
from ._tables import table_row

__all__ = ["compiles_on_cpu", "float_int_matmul", "int_matmul", "int_mm_caveat", "linear_compiled", "linear_cpu"]

# Of a product, finished at a time: of large ones the buffers do not stay in cache and are paged in anew at every call,
# while pieces of a small one cost more than they save. Medians in ms on 2 cores, static, bf16 out, M x K x N, GELU in
# brackets; 2^18 values are 56 rows of N = 4608, 2^22 are 910:
#
#                         2^18         2^19         2^20         2^21         2^22         whole
#     512 x 1152 x 4608   5.2 (6.7)    4.9 (6.4)    5.0 (6.6)    4.4 (6.3)    4.1 (5.8)    4.0 (5.9)
#     2048 x 1152 x 1152  5.1 (6.5)    4.2 (5.7)    3.9 (5.3)    3.8 (5.3)    3.7 (5.1)    3.6 (5.2)
#     4096 x 4608 x 1152  34.8 (35.4)  33.3 (32.4)  30.0 (34.5)  28.8 (32.0)  31.9 (38.7)  36.9 (41.9)
#     4096 x 1152 x 4608  51 (61)      48 (62)      51 (61)      49 (64)      50 (-)       87 (127)
_VALUES_AT_ONCE = 1 << 21
_VALUES_WHOLE = 1 << 22


def linear_cpu(op_name: str, xq: Tensor, weight: Tensor, epilogue: Epilogue) -> Tensor:
    """xq: [..., K] int8.   weight: [N, K] int8.   Returns [..., N] of the epilogue's out_dtype."""
    rows, n = rows_of(xq), weight.shape[0]
    y = epilogue.finish(
        lambda piece: int_matmul(op_name, rows_at(rows, piece), weight),
        rows.shape[0],
        n,
        _VALUES_AT_ONCE,
        _VALUES_WHOLE,
    )
    return y.view(*xq.shape[:-1], n)


def linear_compiled(xq: Tensor, weight: Tensor, epilogue: Epilogue) -> Tensor:
    """The same for torch.compile: Inductor fuses the epilogue with what follows."""
    acc = torch._int_mm(xq.reshape(-1, xq.shape[-1]), weight.t()).view(*xq.shape[:-1], weight.shape[0])
    if epilogue.input_zero_point is None or epilogue.out_dtype == torch.int32:
        return epilogue.apply(acc)
    scale, offset = _column_terms(
        epilogue.weight_scale,
        epilogue.input_scale,
        epilogue.input_zero_point,
        epilogue.weight_sum,
        epilogue.bias_table,
        epilogue.group,
    )
    return epilogue._replace(
        weight_scale=scale, input_scale=None, input_zero_point=None, weight_sum=None, bias=offset
    ).apply(acc)


def compiles_on_cpu(xq: Tensor) -> bool:
    """Whether `linear_compiled` may be traced for this input."""
    return xq.device.type == "cpu" and xq.shape[-1] > 1 and _int_mm_is_exact()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _int_mm_is_exact() -> bool:
    return int_mm_caveat() is None


@functools.cache
def int_mm_caveat() -> str | None:
    """Why the CPU forms avoid torch._int_mm on this machine, or None where it is exact.

    Without VNNI instructions oneDNN multiplies with ones that saturate at 16 bits: wrong for large values, in silence.
    """
    for m in (1, 32):
        x = torch.full((m, 64), 127, dtype=torch.int8)
        try:
            exact = bool((torch._int_mm(x, x.new_full((64, 16), 127)) == 64 * 127 * 127).all())
        except RuntimeError as error:
            return f"torch._int_mm is not available on this CPU ({error}): exact floating-point matmul, slower"
        if not exact:
            return "torch._int_mm saturates on this CPU (no VNNI): exact floating-point matmul, slower"
    return None


def int_matmul(op_name: str, xq: Tensor, weight: Tensor) -> Tensor:
    """xq: [M, K], weight: [N, K], both int8.   Returns [M, N] int32, exact."""
    caveat = int_mm_caveat()
    if caveat is not None:
        announce(op_name, caveat)
        return float_int_matmul(xq, weight)
    if xq.shape[1] == 1:
        # torch._int_mm (2.13) takes a [1, N] operand for its transpose and reads past the end of it.
        return float_int_matmul(xq, weight)
    return torch._int_mm(xq, weight.t())


def float_int_matmul(xq: Tensor, weight: Tensor) -> Tensor:
    """xq: [M, K], weight: [N, K], both int8.   Returns [M, N] int32.

    fp32 holds every integer up to 2^24, which 1024 products of two int8 cannot pass: exact in any order of summation.
    """
    acc = torch.zeros(xq.shape[0], weight.shape[0], dtype=torch.int32)
    for x_part, weight_part in zip(xq.split(1024, dim=1), weight.split(1024, dim=1), strict=True):
        acc += (x_part.float() @ weight_part.float().t()).to(torch.int32)
    return acc


# What does not depend on the row, computed once a call: inlined into the loop over rows, Inductor computes it anew in
# every one of them.


def _column_terms_reference(
    weight_scale: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    group: Tensor,
) -> tuple[Tensor, Tensor]:
    """(scale, offset), [N] fp32 each, such that the current group's output is acc scale + offset.

    Arguments as in `Epilogue`, the bias a table. Leaving the zero point to the offset costs a few 2^-24 of |acc| scale
    and of |zero_point weight_sum| scale, against the eager form, which subtracts integers.
    """
    scale = table_row(input_scale, group) * weight_scale
    offset = -scale * (table_row(input_zero_point, group) * weight_sum)
    return scale, offset if bias is None else offset.add_(table_row(bias, group)[0])


def _column_terms_fake(weight_scale: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight_scale), torch.empty_like(weight_scale)


_column_terms = define_op(
    "column_terms(Tensor weight_scale, Tensor input_scale, Tensor input_zero_point, Tensor weight_sum, Tensor? bias,"
    " Tensor group) -> (Tensor, Tensor)",
    _column_terms_reference,
    fake=_column_terms_fake,
    cpu=_column_terms_reference,
)
