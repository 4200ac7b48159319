# SPDX-License-Identifier: Apache-2.0
"""What happens to the input of a quantized linear before it is rounded, in every form.

    u = ((x - shift[g]) * inv_smooth) R        g: the current timestep group, R: a rotation, see hadamard.py

In fp32 and in this order. K in_features, G timestep groups; a table of one row serves every group.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._arguments import expect, expect_group, expect_table
from ._tables import table_row, table_row_index
from ._triton import jit, tl
from .hadamard import check_order, rotate, rotate_tile

__all__ = ["InputTransform", "KernelTransform", "transform_tile"]


class InputTransform(NamedTuple):
    """group: [1] int64.   shift: [1 or G, K] fp32.   inv_smooth: [K] fp32.

    rotation_signs: [K] int8 of +-1, or None for no rotation.   rotation_order: of H, 1 where there is no rotation.
    """

    group: Tensor
    shift: Tensor | None
    inv_smooth: Tensor | None
    rotation_signs: Tensor | None = None
    rotation_order: int = 1

    def check(self, k: int) -> None:
        """ValueError for what a kernel would read out of bounds or misread."""
        expect_group(self.group)
        if self.shift is not None:
            expect_table("shift", self.shift, (torch.float32,), (k,))
        if self.inv_smooth is not None:
            expect("inv_smooth", self.inv_smooth, (torch.float32,), (k,))
        if self.rotation_signs is not None:
            expect("rotation_signs", self.rotation_signs, (torch.int8,), (k,))
            check_order(self.rotation_order, k)
        elif self.rotation_order != 1:
            raise ValueError(f"rotation_order: expected 1 without rotation_signs, got {self.rotation_order}")

    def apply(self, x: Tensor) -> Tensor:
        """x: [..., K] fp32.   Returns u, [..., K] fp32. The rotation is computed in fp64."""
        if self.shift is not None:
            x = x - table_row(self.shift, self.group)[0]
        if self.inv_smooth is not None:
            x = x * self.inv_smooth
        if self.rotation_signs is not None:
            x = rotate(x.double(), self.rotation_signs, self.rotation_order).float()
        return x

    def apply_in_place(self, u: Tensor, spare: Tensor) -> Tensor:
        """The same on a contiguous buffer, and in fp32 altogether. Returns u, or spare, which is like u."""
        if self.shift is not None:
            u.sub_(table_row(self.shift, self.group))
        if self.inv_smooth is not None:
            u.mul_(self.inv_smooth)
        return u if self.rotation_signs is None else rotate(u, self.rotation_signs, self.rotation_order, spare)

    def for_kernel(self) -> "KernelTransform":
        signs = self.rotation_signs
        return KernelTransform(
            self.group,
            None if self.shift is None else self.shift.contiguous(),
            None if self.inv_smooth is None else self.inv_smooth.contiguous(),
            None if signs is None else signs.contiguous(),
            shift_groups=1 if self.shift is None else len(self.shift),
            rotation_scale=self.rotation_order**-0.5,
        )


class KernelTransform(NamedTuple):
    """An InputTransform as a kernel takes it: pointers, or None for what is absent."""

    group: Any
    shift: Any
    inv_smooth: Any
    signs: Any
    shift_groups: int
    rotation_scale: float


@jit()
def transform_tile(x, t, offs_k, mask_k, K, LOG2: tl.constexpr, PALEY: tl.constexpr):
    """u of one row. x: a tile in the order that rotate_tile asks for, zero where masked; so is the result.

    t: a KernelTransform.
    """
    if t.shift is not None:
        shift_ptr = t.shift + table_row_index(t.group, t.shift_groups) * K
        x -= tl.load(shift_ptr + offs_k, mask=mask_k, other=0.0)
    if t.inv_smooth is not None:
        x *= tl.load(t.inv_smooth + offs_k, mask=mask_k, other=0.0)
    if t.signs is not None:
        signs = tl.load(t.signs + offs_k, mask=mask_k, other=0)
        x = rotate_tile(x * (signs.to(tl.float32) * t.rotation_scale), LOG2, PALEY)
    return x
