# SPDX-License-Identifier: Apache-2.0
"""What launchers do to their arguments: a kernel that is handed the wrong shape reads memory that is not its own."""

import torch
from torch import Tensor

__all__ = ["FLOATS", "contiguous", "expect", "expect_group", "expect_same_groups", "expect_table", "rows_of"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def expect(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | str, ...]) -> None:
    """ValueError unless `tensor` has one of `dtypes` and `shape`, in which a string names a size left free."""
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == size for want, size in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype not in dtypes or not fits:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        given = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected {wanted} [{', '.join(map(str, shape))}], got {given} {list(tensor.shape)}")


def expect_table(name: str, table: Tensor, dtypes: tuple[torch.dtype, ...], row: tuple[int, ...] = ()) -> None:
    """ValueError unless `table` is [G, *row] with G > 0: one row a timestep group, or a single one for all."""
    expect(name, table, dtypes, ("G", *row))
    if table.shape[0] == 0:
        raise ValueError(f"{name}: expected at least one timestep group, got {list(table.shape)}")


def expect_same_groups(**tables: Tensor | None) -> None:
    """ValueError unless the tables [G, ...] that are there, one row for all groups aside, have the same G."""
    common = 1
    for table in tables.values():
        rows = 1 if table is None else table.shape[0]
        if rows != 1 and common != 1 and rows != common:
            given = ", ".join(f"{name} {len(table)}" for name, table in tables.items() if table is not None)
            raise ValueError(f"{', '.join(tables)}: expected 1 row or the same number of timestep groups, got {given}")
        common = max(rows, common)


def expect_group(group: Tensor) -> None:
    """ValueError unless `group` is what the model-level hook writes: one int64."""
    expect("group", group, (torch.int64,), (1,))


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """What a kernel takes for a tensor that may be absent."""
    return None if tensor is None else tensor.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """x: [..., K].   Returns [M, K] with unit stride along K: a view where the strides of x allow one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
