# SPDX-License-Identifier: Apache-2.0
"""Rows of floating point to rows of int8, in one pass over memory: produce, transform, round.

What the quantize ops have in common is all but their arguments: a Plan says what to do, and every form does it.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._arguments import FLOATS, expect_same_groups, rows_of
from ._epilogue import gelu_tanh_tile
from ._input_transform import InputTransform, transform_tile
from ._library import announce, define_op
from ._producers import Gelu, Norm, Producer, norm_tile
from ._rounding import Rounded, Rounding, round_dynamic_tile, round_static_tile
from ._triton import jit, tl
from .hadamard import paley_channels, split_order

__all__ = ["Plan", "RowTile", "apply_plan", "define_rows_op", "row_tile", "triton_form"]

# Of fp32, finished at a time on a CPU: larger pieces do not stay in cache, and their buffers are paged in anew every
# call (4096 x 4608 bf16, static, one core: 42 ms at once, 6 ms in pieces).
_VALUES_AT_ONCE = 1 << 20


class Plan(NamedTuple):
    """The arguments of a quantize op after its input.   keep: whether x, the producer's result, is wanted as well."""

    rounding: Rounding
    transform: InputTransform
    producer: Producer = Producer()
    keep: bool | None = None

    def check(self, h: Tensor) -> None:
        if h.dtype not in FLOATS or h.dim() == 0 or h.shape[-1] == 0:
            raise ValueError(f"x: expected float [..., K] with K > 0, got {h.dtype} {list(h.shape)}")
        k = h.shape[-1]
        self.rounding.check(k)
        self.transform.check(k)
        self.producer.check(h.numel() // k, k)
        scale, zero_point = self.rounding.scale, self.rounding.zero_point
        if scale is not None:
            expect_same_groups(scale=scale, zero_point=zero_point, shift=self.transform.shift)

    def empty_x(self, h: Tensor) -> Tensor | None:
        """Room for x, of shape (0,) unless it is wanted; None where the op has no such result."""
        if self.keep is None:
            return None
        return torch.empty(h.shape if self.keep else (0,), dtype=h.dtype, device=h.device)


Results = Tensor | tuple[Tensor, ...]


def _results(rounded: Rounded, x: Tensor | None) -> Results:
    present = tuple(t for t in (*rounded, x) if t is not None)
    return present[0] if len(present) == 1 else present


# Reference


def apply_plan(h: Tensor, plan: Plan) -> Results:
    """h: [..., K] float.   Returns q int8 [..., K], then scales and zero points if dynamic, then x if asked."""
    x = plan.producer.apply(h.float())
    rounded = plan.rounding.apply(plan.transform.apply(x), plan.transform.group)
    return _results(rounded, x.to(h.dtype, copy=True) if plan.keep else plan.empty_x(h))


# CPU: the same in place on one fp32 buffer, a piece of the rows at a time


def _apply_plan_cpu(h: Tensor, plan: Plan) -> Results:
    plan.check(h)
    rounded, x = plan.rounding.empty(h.shape, h.device), plan.empty_x(h)
    if h.numel():
        samples, k = plan.producer.modulation_rows, h.shape[-1]
        rows = h.reshape(samples, -1, k)
        each, step = rows.shape[1], max(1, _VALUES_AT_ONCE // k)
        into = [t.view(samples, each, -1) for t in (*rounded, x if plan.keep else None) if t is not None]
        if samples * each <= step:
            _apply_to_piece(plan, rows, slice(None), _buffers(plan, rows.shape), into)
        else:
            flat = _buffers(plan, torch.Size((step * k,)))
            for piece in _pieces(samples, each, step):
                part = rows[piece]
                buffers = [buffer[: part.numel()].view(part.shape) for buffer in flat]
                _apply_to_piece(plan, part, piece[0], buffers, [t[piece] for t in into])
    return _results(rounded, x)


def _buffers(plan: Plan, shape: torch.Size) -> list[Tensor]:
    """One to work in and, where a step needs it, a spare one."""
    spare = isinstance(plan.producer, Gelu) or plan.transform.rotation_signs is not None
    return [torch.empty(shape, dtype=torch.float32, device=plan.transform.group.device) for _ in range(1 + spare)]


def _apply_to_piece(plan: Plan, rows: Tensor, samples: slice, buffers: list[Tensor], into: list[Tensor]) -> None:
    """rows: [samples, rows of one, K].   buffers: like rows.   into: results, x at the end."""
    u, spare = buffers[0].copy_(rows), buffers[-1]
    plan.producer.apply_in_place(u, spare, samples)
    if plan.keep:
        into.pop().copy_(u)
    u = plan.transform.apply_in_place(u, spare)
    plan.rounding.apply_in_place(u, plan.transform.group, Rounded(*into))


def _pieces(samples: int, each: int, step: int) -> Iterator[tuple[slice, slice]]:
    """Samples of `each` rows in pieces of at most `step` rows, which are whole samples or lie within one."""
    if each <= step:
        for start in range(0, samples, step // each):
            yield slice(start, start + step // each), slice(None)
    else:
        for sample in range(samples):
            for start in range(0, each, step):
                yield slice(sample, sample + 1), slice(start, start + step)


# Kernel


class RowTile(NamedTuple):
    """How one program holds a row: [groups, block], both powers of two, and what rotation it undergoes.

    The order of the rotation is 2^log2, times 36 if paley.
    """

    groups: int
    block: int
    log2: int
    paley: bool
    num_warps: int


@jit("rows_per_sample", "low", "high")
def _quantize_rows_kernel(
    h_ptr,
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_point_ptr,
    norm,
    transform,
    K,
    group_size,
    stride_hm,
    scale_groups,
    zero_point_groups,
    rows_per_sample,
    low,
    high,
    PRODUCER: tl.constexpr,
    ROUNDING: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG2: tl.constexpr,
    PALEY: tl.constexpr,
):
    """One program takes one row of h from memory to its integers.

    scale_ptr, zero_point_ptr: tables to read if static, else results. x_ptr: where to keep x, or None.
    ROUNDING "none": q is u itself.
    """
    m = tl.program_id(0).to(tl.int64)
    offs_k, mask_k = _row_offsets(K, group_size, GROUPS, BLOCK, LOG2, PALEY)
    x = tl.load(h_ptr + m * stride_hm + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    if norm is not None:
        x = norm_tile(x, norm, m // rows_per_sample, offs_k, mask_k, K, PRODUCER == "layer")
    elif PRODUCER == "gelu":
        x = gelu_tanh_tile(x)
    if x_ptr is not None:
        tl.store(x_ptr + m * K + offs_k, x.to(x_ptr.dtype.element_ty), mask=mask_k)
    u = transform_tile(x, transform, offs_k, mask_k, K, LOG2, PALEY)
    if ROUNDING == "static":
        u = round_static_tile(
            u, transform.group, scale_ptr, zero_point_ptr, scale_groups, zero_point_groups, low, high
        )
    elif ROUNDING != "none":
        u, scale, zero_point = round_dynamic_tile(u, low, high, ROUNDING == "symmetric")
        offs_g = tl.arange(0, GROUPS)
        mask_g = offs_g * group_size < K
        offs_g += m * (K // group_size)
        tl.store(scale_ptr + offs_g, scale, mask=mask_g)
        if zero_point_ptr is not None:
            tl.store(zero_point_ptr + offs_g, zero_point.to(tl.int32), mask=mask_g)
    tl.store(q_ptr + m * K + offs_k, u.to(q_ptr.dtype.element_ty), mask=mask_k)


@jit()
def _row_offsets(K, group_size, GROUPS: tl.constexpr, BLOCK: tl.constexpr, LOG2: tl.constexpr, PALEY: tl.constexpr):
    """Channels of a [GROUPS, BLOCK] tile, in the order that rotate_tile asks for, and which of them exist."""
    offs = tl.arange(0, BLOCK)[None, :]
    if PALEY:
        return paley_channels(offs, K, BLOCK // 64, LOG2)
    offs_k = tl.arange(0, GROUPS)[:, None] * group_size + offs
    return offs_k, (offs < group_size) & (offs_k < K)


# Launcher

# Numbers of a row that a program holds without spilling registers, compiled ahead. Only plain rows of 16-bit numbers,
# rotated within a warp, get by with the 64 a thread that the longest rows come to.
_MAX_BLOCK = 16384
_MAX_BLOCK_NORM = 8192
_MAX_BLOCK_PALEY = 8192
_MAX_BLOCK_16_BIT = 32768
_WARP_POWER = 256


def row_tile(plan: Plan, dtype: torch.dtype, k: int) -> RowTile | None:
    """For rows of k numbers of `dtype`; None where there is no kernel: some rotations in groups, long rows."""
    paley, power = split_order(plan.transform.rotation_order)
    size = plan.rounding.group_size or k
    groups, block = _next_power_of_two(k // size), _next_power_of_two(size)
    # A rotation may go across groups of channels that lie side by side, without padding.
    if groups > 1 and (paley > 1 or (block > size and size % power)):
        return None
    if paley > 1:
        block = 64 * max(16, _next_power_of_two(k // paley))
        most = _MAX_BLOCK_PALEY
    elif isinstance(plan.producer, Norm):
        most = _MAX_BLOCK_NORM
    else:
        short = dtype.itemsize == 2 and groups == 1 and power <= _WARP_POWER
        most = _MAX_BLOCK_16_BIT if short else _MAX_BLOCK
    if groups * block > most:
        return None
    num_warps = min(max(groups * block // (1024 if paley > 1 else 512), 1), 16)
    return RowTile(groups, block, power.bit_length() - 1, paley > 1, num_warps)


def _next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _apply_plan_triton(name: str, h: Tensor, plan: Plan) -> Results:
    plan.check(h)
    k = h.shape[-1]
    tile = row_tile(plan, h.dtype, k)
    if tile is not None:
        rounded, x = plan.rounding.empty(h.shape, h.device), plan.empty_x(h)
        _launch(h, plan, tile, plan.rounding.mode, rounded, x if plan.keep else None)
        return _results(rounded, x)
    # Rotations that a tile of groups does not allow go by way of u in memory.
    rotated = plan._replace(rounding=plan.rounding._replace(group_size=None))
    alone = Plan(plan.rounding, InputTransform(plan.transform.group, None, None))
    tile = row_tile(rotated, h.dtype, k)
    if plan.rounding.group_size is None or tile is None or row_tile(alone, torch.float32, k) is None:
        announce(name, f"no program holds a row of {k} {str(h.dtype).removeprefix('torch.')}: plain torch")
        return apply_plan(h, plan)
    u = torch.empty(h.shape, dtype=torch.float32, device=h.device)
    _launch(h, rotated, tile, "none", Rounded(u), None)
    return _apply_plan_triton(name, u, alone)


def _launch(h: Tensor, plan: Plan, tile: RowTile, mode: str, into: Rounded, x: Tensor | None) -> None:
    if not h.numel():
        return
    rows = rows_of(h)
    m, k = rows.shape
    producer, (low, high) = plan.producer, plan.rounding.limits
    scale, zero_point, scale_groups, zero_point_groups = into.scale, into.zero_point, 1, 1
    if plan.rounding.scale is not None and plan.rounding.zero_point is not None:
        scale, zero_point = plan.rounding.scale.contiguous(), plan.rounding.zero_point.contiguous()
        scale_groups, zero_point_groups = len(scale), len(zero_point)
    with torch.cuda.device_of(h):
        _quantize_rows_kernel[(m,)](
            rows,
            x,
            into.q,
            scale,
            zero_point,
            producer.for_kernel() if isinstance(producer, Norm) else None,
            plan.transform.for_kernel(),
            k,
            k if tile.groups == 1 else plan.rounding.group_size,
            rows.stride(0),
            scale_groups,
            zero_point_groups,
            m // producer.modulation_rows,
            low,
            high,
            PRODUCER=producer.name,
            ROUNDING=mode,
            GROUPS=tile.groups,
            BLOCK=tile.block,
            LOG2=tile.log2,
            PALEY=tile.paley,
            num_warps=tile.num_warps,
        )


# Registration


def triton_form(name: str, plan: Callable[..., Plan]) -> Callable[..., Results]:
    """The Triton launcher of the op `name`, on any device: what the interpreter runs in tests."""
    return lambda h, *parameters: _apply_plan_triton(name, h, plan(*parameters))


def define_rows_op(schema: str, reference: Callable[..., Results], plan: Callable[..., Plan]) -> Callable[..., Any]:
    """`define_op` for an op whose arguments after the first `plan` understands.

    Compiled, it is plain torch, which Inductor fuses with what computes h; but the op itself where there is a
    rotation, of which Inductor would make matrix products.
    """
    name = schema.partition("(")[0]

    def cpu(h: Tensor, *parameters: Any) -> Results:
        return _apply_plan_cpu(h, plan(*parameters))

    def fake(h: Tensor, *parameters: Any) -> Results:
        made = plan(*parameters)
        return _results(made.rounding.empty(h.shape, h.device), made.empty_x(h))

    def compiled(h: Tensor, *parameters: Any) -> Results:
        made = plan(*parameters)
        if made.transform.rotation_signs is None:
            return apply_plan(h, made)
        results: Results = op.op(h, *parameters)  # type: ignore[attr-defined]
        return results

    op = define_op(schema, reference, fake=fake, cpu=cpu, triton=triton_form(name, plan), compiled=compiled)
    return op
