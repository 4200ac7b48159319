# SPDX-License-Identifier: Apache-2.0
"""Exact products of int8 matrices on a CPU, and the linear layer around one."""

import functools

import torch
from torch import Tensor

from ._arguments import rows_of
from ._epilogue import Epilogue
from ._library import announce, define_op
from ._tables import table_row

__all__ = ["compiles_on_cpu", "int_mm_caveat", "linear_compiled", "linear_cpu"]

# Of a product, finished at a time: larger pieces do not stay in cache, and their buffers are paged in anew every call
# (4096 x 1152 x 4608 on 2 cores: 77 ms at once, 38 ms in pieces of 128 rows, 39 ms of 256; 512 rows are best whole).
_VALUES_AT_ONCE = 1 << 22


def linear_cpu(op_name: str, xq: Tensor, weight: Tensor, epilogue: Epilogue) -> Tensor:
    """xq: [..., K] int8.   weight: [N, K] int8.   Returns [..., N] of the epilogue's out_dtype."""
    rows, n = rows_of(xq), weight.shape[0]
    m = rows.shape[0]
    pieces = max(1, -(-m * n // _VALUES_AT_ONCE))
    step = max(1, -(-m // pieces))
    if step >= m:
        y = epilogue.of_rows(0, m, m).apply(_int_matmul(op_name, rows, weight))
        return y.view(*xq.shape[:-1], n)
    y = torch.empty(m, n, dtype=epilogue.out_dtype)
    for start in range(0, m, step):
        stop = min(start + step, m)
        acc = _int_matmul(op_name, rows[start:stop], weight)
        y[start:stop] = epilogue.of_rows(start, stop, m).apply(acc)
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


def _int_matmul(op_name: str, xq: Tensor, weight: Tensor) -> Tensor:
    """xq: [M, K], weight: [N, K], both int8.   Returns [M, N] int32, exact."""
    caveat = int_mm_caveat()
    if caveat is not None:
        announce(op_name, caveat)
        return _float_int_matmul(xq, weight)
    if xq.shape[1] == 1:
        # torch._int_mm (2.13) takes a [1, N] operand for its transpose and reads past the end of it.
        return _float_int_matmul(xq, weight)
    return torch._int_mm(xq, weight.t())


def _float_int_matmul(xq: Tensor, weight: Tensor) -> Tensor:
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
