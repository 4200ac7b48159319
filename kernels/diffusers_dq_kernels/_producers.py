# SPDX-License-Identifier: Apache-2.0
"""What computes the input of a quantized linear, where the quantize kernel can do it on the way: in fp32, row by row.

    norm    x = norm(h) * (1 + modulation_scale[r]) + modulation_shift[r]        LayerNorm or RMSNorm over K
    gelu    x = GELU(h), tanh form

M rows, K channels. A modulation has R rows, of which row m of h takes r = m // (M / R): one row a sample.
"""
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import FLOATS, expect
from ._epilogue import GELU_CUBIC, GELU_SLOPE
from ._triton import jit, tl

__all__ = ["NORMS", "Gelu", "KernelNorm", "Norm", "Producer", "norm_tile"]

NORMS = ("layer", "rms")


class Producer:
    """The input is there already: x = h. The base of what computes it."""

    name = "none"
    modulation_rows = 1

    def check(self, rows: int, k: int) -> None:
        """ValueError for what a kernel would read out of bounds or misread."""

    def apply(self, h: Tensor) -> Tensor:
        """h: [..., K] fp32.   Returns x, [..., K] fp32."""
        return h

    def apply_in_place(self, h: Tensor, spare: Tensor, samples: slice) -> None:
        """The same in the contiguous buffer h [samples, rows, K]. spare: like h.   samples: rows of the modulation."""


class Gelu(Producer):
    name = "gelu"

    def apply(self, h: Tensor) -> Tensor:
        return F.gelu(h, approximate="tanh")

    def apply_in_place(self, h: Tensor, spare: Tensor, samples: slice) -> None:
        # By way of a sigmoid, as in _epilogue.gelu_tanh: 2^20 numbers in 0.6 ms, which F.gelu takes 1.2 ms for.
        torch.mul(h, h, out=spare).mul_(GELU_SLOPE * GELU_CUBIC).add_(GELU_SLOPE).mul_(h)
        h.mul_(spare.sigmoid_())


@dataclass(frozen=True)
class Norm(Producer):
    """kind: "layer" or "rms".   weight, bias: [K] float or None.   modulation_scale, _shift: [R, K] float or None."""

    kind: str
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    modulation_scale: Tensor | None
    modulation_shift: Tensor | None

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.kind

    @property
    def modulation_rows(self) -> int:  # type: ignore[override]
        return next((len(t) for t in (self.modulation_scale, self.modulation_shift) if t is not None), 1)

    def check(self, rows: int, k: int) -> None:
        if self.kind not in NORMS:
            raise ValueError(f"kind: expected one of {NORMS}, got {self.kind!r}")
        for name in ("weight", "bias"):
            vector = getattr(self, name)
            if vector is not None:
                expect(name, vector, FLOATS, (k,))
        for name in ("modulation_scale", "modulation_shift"):
            table = getattr(self, name)
            if table is None:
                continue
            expect(name, table, FLOATS, ("R", k))
            if len(table) == 0 or rows % len(table) or len(table) != self.modulation_rows:
                raise ValueError(
                    f"{name}: expected [R, {k}] where R divides the {rows} rows of h and is the same in scale and"
                    f" shift, got {list(table.shape)}"
                )

    def apply(self, h: Tensor) -> Tensor:
        weight, bias = _float(self.weight), _float(self.bias)
        if self.kind == "layer":
            x = F.layer_norm(h, h.shape[-1:], weight, bias, self.eps)
        else:
            x = F.rms_norm(h, h.shape[-1:], weight, self.eps)
            x = x if bias is None else x + bias
        samples, k = self.modulation_rows, h.shape[-1]
        x = x.reshape(samples, h.numel() // (samples * k), k)
        if self.modulation_scale is not None:
            x = x * (1 + self.modulation_scale.float()[:, None])
        if self.modulation_shift is not None:
            x = x + self.modulation_shift.float()[:, None]
        return x.view(h.shape)

    def apply_in_place(self, h: Tensor, spare: Tensor, samples: slice) -> None:
        if self.kind == "layer":
            h.sub_(h.mean(-1, keepdim=True))
        mean_square = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(h.shape[-1])
        h.mul_(mean_square.add_(self.eps).rsqrt_())
        if self.weight is not None:
            h.mul_(self.weight.float())
        if self.bias is not None:
            h.add_(self.bias.float())
        if self.modulation_scale is not None:
            h.mul_(1 + self.modulation_scale[samples, None].float())
        if self.modulation_shift is not None:
            h.add_(self.modulation_shift[samples, None].float())

    def for_kernel(self) -> "KernelNorm":
        scale, shift = _rows(self.modulation_scale), _rows(self.modulation_shift)
        return KernelNorm(
            None if self.weight is None else self.weight.contiguous(),
            None if self.bias is None else self.bias.contiguous(),
            scale,
            shift,
            scale_stride=0 if scale is None else scale.stride(0),
            shift_stride=0 if shift is None else shift.stride(0),
            eps=self.eps,
        )


class KernelNorm(NamedTuple):
    """A Norm as a kernel takes it: pointers, or None for what is absent."""

    weight: Any
    bias: Any
    modulation_scale: Any
    modulation_shift: Any
    scale_stride: int
    shift_stride: int
    eps: float


def _float(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float()


def _rows(table: Tensor | None) -> Tensor | None:
    return table if table is None or table.stride(1) == 1 else table.contiguous()


# Kernel parts


@jit()
def norm_tile(h, n, sample, offs_k, mask_k, K, LAYER: tl.constexpr):
    """x of one row. h: all of the row, zero where masked; so is the result.   n: a KernelNorm.   sample: r."""
    if LAYER:
        h = tl.where(mask_k, h - tl.sum(h) / K, 0.0)
    h *= tl.rsqrt(tl.sum(h * h) / K + n.eps)
    if n.weight is not None:
        h *= tl.load(n.weight + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    if n.bias is not None:
        h += tl.load(n.bias + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    if n.modulation_scale is not None:
        scale_ptr = n.modulation_scale + sample * n.scale_stride
        h *= 1.0 + tl.load(scale_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    if n.modulation_shift is not None:
        shift_ptr = n.modulation_shift + sample * n.shift_stride
        h += tl.load(shift_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    return h
