# SPDX-License-Identifier: Apache-2.0
"""Tables with a row for each timestep group. The current group is a device tensor: looking it up never syncs."""
# mypy: disable-error-code="no-untyped-def"

from torch import Tensor

from ._triton import jit, tl

__all__ = ["table_row", "table_row_index"]


def table_row(table: Tensor, group: Tensor) -> Tensor:
    """table: [G, ...], one row a group, or [1, ...] for all groups.   group: [1] int64.   Returns [1, ...]."""
    return table if table.shape[0] == 1 else table.index_select(0, group)


@jit()
def table_row_index(group_ptr, rows):
    """The same inside a kernel. The clamp serves tables of one row, and keeps a wrong group from reading outside."""
    return tl.maximum(tl.minimum(tl.load(group_ptr), rows - 1), 0)
