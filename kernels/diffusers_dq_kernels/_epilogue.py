# SPDX-License-Identifier: Apache-2.0
"""What turns the accumulator of a product into the output of a linear, in every form: the same arguments everywhere.

    z[m, n] = (acc[m, n] - zero_point[g] * weight_sum[n]) * (input_scale * weight_scale[n]) + bias[g, n]
    y[m, n] = residual[m, n] + gate[m, n] * activation(z[m, n])

The input scale is one number for the current timestep group g (static) or one a row (dynamic); it is absent where the
input was not rounded. acc is an exact integer where it was. M rows, N out_features, G timestep groups.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._arguments import FLOATS, contiguous, expect, expect_group, expect_same_groups, expect_table
from ._tables import table_row, table_row_index
from ._triton import jit, tl

__all__ = ["ACTIVATIONS", "FINISH_SCHEMA", "Epilogue", "KernelEpilogue", "pieces", "rows_at", "store_output"]

ACTIVATIONS = ("none", "gelu_tanh")

# The part of an op's schema that every product has after its scales; its parameters are the last ones of Epilogue.
FINISH_SCHEMA = "Tensor? gate=None, Tensor? residual=None, str activation='none'"

# tanh(u) = 2 sigmoid(2 u) - 1, so GELU's tanh form is v sigmoid(2 u) with u = sqrt(2 / pi) (v + 0.044715 v^3).
GELU_SLOPE = 1.5957691216057308
GELU_CUBIC = 0.044715


class Epilogue(NamedTuple):
    """The parameters of a linear op after its input and weight, in the order of its schema.

    weight_scale: [N] fp32.   input_scale: [1 or G] fp32 where there is an input_zero_point, [...] fp32, one a row,
    where there is none; None for inputs that are not integers, or where it is in weight_scale already, as it can be if
    one serves all groups.   input_zero_point: [1 or G] int32.   weight_sum: [N]
    int32, sums of the integer weight over K.   bias: [N] or [1 or G, N] float.   group: [1] int64.
    out_dtype: torch.int32 asks for acc - zero_point weight_sum.   residual: as the output, float.
    gate: float [..., N]; each leading size is the output's, or 1 from some dimension on: [B, 1, N] for [B, T, N].
    activation: "none" or "gelu_tanh".
    """

    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    weight_sum: Tensor | None
    bias: Tensor | None
    group: Tensor
    out_dtype: torch.dtype
    gate: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"

    @property
    def bias_table(self) -> Tensor | None:
        """[1 or G, N]."""
        return self.bias[None] if self.bias is not None and self.bias.dim() == 1 else self.bias

    def check(self, lead: torch.Size, n: int) -> None:
        """ValueError for what a kernel would read out of bounds or misread. lead: leading sizes of the output."""
        expect("weight_scale", self.weight_scale, (torch.float32,), (n,))
        expect_group(self.group)
        self._check_input_scale(lead, n)
        table = self.bias_table
        if table is not None:
            expect_table("bias", table, FLOATS, (n,))
        if self.input_zero_point is not None:
            expect_same_groups(input_scale=self.input_scale, input_zero_point=self.input_zero_point, bias=table)
        if self.residual is not None:
            expect("residual", self.residual, FLOATS, (*lead, n))
        if self.gate is not None:
            _check_gate(self.gate, lead, n)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {self.activation!r}")
        if self.out_dtype == torch.int32:
            if self.gate is not None or self.residual is not None or self.activation != "none":
                raise ValueError("out_dtype=torch.int32 asks for the bare integers: no gate, residual or activation")
        elif self.out_dtype not in FLOATS:
            raise ValueError(f"out_dtype: expected a floating-point type or torch.int32, got {self.out_dtype}")

    def _check_input_scale(self, lead: torch.Size, n: int) -> None:
        if self.input_scale is None:
            if self.input_zero_point is not None:
                raise ValueError("input_scale: expected float32 [G] beside an input_zero_point, got None")
            return
        if self.input_zero_point is None:
            expect("input_scale", self.input_scale, (torch.float32,), tuple(lead))
            return
        expect_table("input_scale", self.input_scale, (torch.float32,))
        expect_table("input_zero_point", self.input_zero_point, (torch.int32,))
        if self.weight_sum is None:
            raise ValueError("weight_sum: expected int32 [N] beside an input_zero_point, got None")
        expect("weight_sum", self.weight_sum, (torch.int32,), (n,))

    def finish(
        self, sums: Callable[[slice | None], Tensor], rows: int, n: int, at_once: int, whole: int | None = None
    ) -> Tensor:
        """The output of all `rows` rows, its leading sizes taken together, a piece at a time.

        sums: the accumulator [rows, N] of a piece of the rows, or of all for None.   at_once: values in a piece.
        whole: so many may be one piece, if more than at_once.   Returns [rows, N] of out_dtype.
        """
        if rows * n == 0:
            return torch.empty(rows, n, dtype=self.out_dtype)
        gate, each = (None, rows) if self.gate is None else gate_rows(self.gate, rows)
        if rows * n <= max(whole or 0, at_once):
            y = self._finish_piece(sums, None, gate, each)
            return y if gate is None else y.view(rows, n)
        y = torch.empty(rows, n, dtype=self.out_dtype)
        for start, stop in pieces(rows, each, max(1, at_once // n)):
            self._finish_piece(sums, slice(start, stop), gate, each, y)
        return y

    def _finish_piece(
        self,
        sums: Callable[[slice | None], Tensor],
        piece: slice | None,
        gate: Tensor | None,
        each: int,
        y: Tensor | None = None,
    ) -> Tensor:
        """With a gate [R, N] as [S, rows, N], for which S rows of it, or one, are [S, 1, N].   y: to write in."""
        acc, epilogue = sums(piece), self
        (*lead, n) = acc.shape
        if gate is not None:
            rows = min(each, lead[0])
            lead = [lead[0] // rows, rows]
            acc = acc.view(*lead, n)
            of_gate = None if piece is None else slice(piece.start // each, -(-piece.stop // each))
            epilogue = epilogue._replace(gate=rows_at(gate, of_gate)[:, None])
        if self.input_scale is not None and self.input_zero_point is None:
            scale = rows_at(self.input_scale.reshape(-1), piece)
            epilogue = epilogue._replace(input_scale=scale if gate is None else scale.view(lead))
        if self.residual is not None:
            epilogue = epilogue._replace(residual=rows_at(self.residual.reshape(-1, n), piece).unflatten(0, lead))
        return epilogue.apply(acc, None if y is None else rows_at(y, piece).view(acc.shape))

    def apply(self, acc: Tensor, into: Tensor | None = None) -> Tensor:
        """acc: [..., N] int32, or float, which may hold integers as well; it is overwritten.

        Returns [..., N] of out_dtype, by way of fp64 from fp64, which is the reference, else by way of fp32. into: it.
        """
        y = self._applied(acc)
        return y.to(self.out_dtype) if into is None else into.copy_(y)

    def _applied(self, acc: Tensor) -> Tensor:
        """Before it is rounded to out_dtype."""
        if self.input_zero_point is not None and self.weight_sum is not None:
            acc.sub_(table_row(self.input_zero_point, self.group).to(acc.dtype) * self.weight_sum.to(acc.dtype))
        if self.out_dtype == torch.int32:
            return acc
        wide = torch.float64 if acc.dtype == torch.float64 else torch.float32
        y = acc.to(wide).mul_(self._scale(wide))
        table = self.bias_table
        if table is not None:
            y.add_(table_row(table, self.group)[0])
        if self.activation == "gelu_tanh":
            y = gelu_tanh(y)
        if self.gate is not None:
            y.mul_(self.gate)
        if self.residual is not None:
            y.add_(self.residual)
        return y

    def _scale(self, wide: torch.dtype) -> Tensor:
        """[N], or [..., N] where every row has its own input scale."""
        weight_scale = self.weight_scale.to(wide)
        if self.input_scale is None:
            return weight_scale
        if self.input_zero_point is not None:
            return table_row(self.input_scale, self.group).to(wide) * weight_scale
        return self.input_scale[..., None].to(wide) * weight_scale

    def for_kernel(self, rows: int, n: int) -> "KernelEpilogue":
        """Contiguous tables and the strides of what is not."""
        table, gate, residual, each = self.bias_table, self.gate, self.residual, 1
        if gate is not None:
            gate, each = gate_rows(gate, rows)
        if residual is not None:
            residual = _with_unit_stride(residual.reshape(rows, n))
        return KernelEpilogue(
            self.weight_scale.contiguous(),
            contiguous(self.input_scale),
            contiguous(self.input_zero_point),
            contiguous(self.weight_sum),
            contiguous(table),
            self.group,
            gate,
            residual,
            scale_groups=1 if self.input_scale is None or self.input_zero_point is None else len(self.input_scale),
            zero_point_groups=1 if self.input_zero_point is None else len(self.input_zero_point),
            bias_groups=1 if table is None else len(table),
            rows_per_gate=each,
            gate_stride=0 if gate is None else gate.stride(0),
            residual_stride=0 if residual is None else residual.stride(0),
        )


class KernelEpilogue(NamedTuple):
    """An Epilogue as a kernel takes it: pointers, or None for what is absent, and how they are laid out."""

    weight_scale: Any
    input_scale: Any
    zero_point: Any
    weight_sum: Any
    bias: Any
    group: Any
    gate: Any
    residual: Any
    scale_groups: int
    zero_point_groups: int
    bias_groups: int
    rows_per_gate: int
    gate_stride: int
    residual_stride: int


def gate_rows(gate: Tensor, rows: int) -> tuple[Tensor, int]:
    """([R, N], how many rows of an output of `rows` rows follow one another with the same row of the gate)."""
    gate = _with_unit_stride(gate.reshape(-1, gate.shape[-1]))
    return gate, max(1, rows // max(1, len(gate)))


def rows_at(matrix: Tensor, piece: slice | None) -> Tensor:
    """The rows of a piece; of None, all, and without the microsecond that a slice takes."""
    return matrix if piece is None else matrix[piece]


def pieces(rows: int, each: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces of at most `most` rows, which are whole samples of `each` rows or lie within one."""
    if each <= most:
        step = most // each * each
        yield from ((start, min(start + step, rows)) for start in range(0, rows, step))
        return
    step = -(-each // -(-each // most))  # of the same size, nearly
    for sample in range(0, rows, each):
        yield from ((start, min(start + step, sample + each)) for start in range(sample, sample + each, step))


def gelu_tanh(y: Tensor) -> Tensor:
    """F.gelu(y, approximate="tanh") by way of a sigmoid, which CPUs compute faster than tanh."""
    argument = (y * y).mul_(GELU_SLOPE * GELU_CUBIC).add_(GELU_SLOPE).mul_(y)
    return argument.sigmoid_().mul_(y)


def _check_gate(gate: Tensor, lead: torch.Size, n: int) -> None:
    shape = gate.shape[:-1]
    same = next((i for i, (ours, theirs) in enumerate(zip(shape, lead, strict=False)) if ours != theirs), len(lead))
    fits = len(shape) == len(lead) and all(size == 1 for size in shape[same:]) and gate.shape[-1:] == (n,)
    if gate.dtype not in FLOATS or not fits:
        given = f"{gate.dtype} {list(gate.shape)}"
        raise ValueError(
            f"gate: expected float {[*lead, n]}, where from some dimension on leading sizes may be 1, got {given}"
        )


def _with_unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


# Kernel parts


@jit()
def gelu_tanh_tile(v):
    return v * tl.sigmoid(v * (1.5957691216057308 + 0.07135481627159844 * v * v))


@jit()
def store_output(acc, m, n, y_ptr, e, M, N, GELU: tl.constexpr):
    """Finish one tile and store it. m, n: row and column of each element, in two shapes that broadcast to acc's.

    e: a KernelEpilogue. With a zero point the input scale is a table over groups, without one it is [M].
    """
    if e.zero_point is not None:
        zero_point = tl.load(e.zero_point + table_row_index(e.group, e.zero_point_groups))
        acc -= zero_point * tl.load(e.weight_sum + n, mask=n < N, other=0)
    inside = (m < M) & (n < N)
    if y_ptr.dtype.element_ty == tl.int32:
        y = acc
    else:
        scale = tl.load(e.weight_scale + n, mask=n < N, other=0.0)
        if e.zero_point is not None:
            scale *= tl.load(e.input_scale + table_row_index(e.group, e.scale_groups))
        y = acc.to(tl.float32) * scale
        if e.input_scale is not None and e.zero_point is None:
            y *= tl.load(e.input_scale + m, mask=m < M, other=0.0)
        if e.bias is not None:
            bias_ptr = e.bias + table_row_index(e.group, e.bias_groups) * N
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        if GELU:
            y = gelu_tanh_tile(y)
        if e.gate is not None:
            gate_ptr = e.gate + (m // e.rows_per_gate).to(tl.int64) * e.gate_stride
            y *= tl.load(gate_ptr + n, mask=inside, other=0.0).to(tl.float32)
        if e.residual is not None:
            residual_ptr = e.residual + m.to(tl.int64) * e.residual_stride
            y += tl.load(residual_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + m.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=inside)
