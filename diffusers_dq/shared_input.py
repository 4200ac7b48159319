# SPDX-License-Identifier: Apache-2.0
"""Rounds an activation once for all the linears that read it: query, key and value."""

import weakref
from typing import Any, NamedTuple

from torch import Tensor


class RoundedInput(NamedTuple):
    """integers: [..., K] int8.   scale: fp32, [...], one a token, or [..., K / g], one a group; None where the layer's
    own static one applies.   zero_point: int32, of groups."""

    integers: Tensor
    scale: Tensor | None
    zero_point: Tensor | None = None


class _Kept(NamedTuple):
    activation: "weakref.ref[Tensor]"
    versions: tuple[int, ...]
    rounded: RoundedInput


class SharedInput:
    """The rounded input of linears with equal tables: the first that sees an activation rounds it, the others find it.

    Kept no longer than the activation lives, and found only while neither it nor the timestep group has been written
    to, other than through `.data` or NumPy, which no tensor notices. Tensors made under torch.inference_mode count no
    writes, so they are never kept; nor is what wants a gradient, whose integers would keep it alive. A copy starts out
    empty.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def find(self, activation: Tensor, group: Tensor, bits: int) -> RoundedInput | None:
        """group: the tensor that holds the timestep group.   bits: that it was rounded to."""
        kept = self._kept
        if kept is None or kept.activation() is not activation or kept.versions != _versions(activation, group, bits):
            return None
        return kept.rounded

    def keep(self, activation: Tensor, group: Tensor, rounded: RoundedInput, bits: int) -> None:
        if activation.is_inference() or group.is_inference() or activation.requires_grad:
            return
        self._kept = _Kept(weakref.ref(activation, self._forget), _versions(activation, group, bits), rounded)

    def _forget(self, _: object) -> None:
        self._kept = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedInput":
        return SharedInput()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return SharedInput, ()


def _versions(activation: Tensor, group: Tensor, bits: int) -> tuple[int, ...]:
    """How often each has been written to in place, and the bits."""
    return activation._version, group._version, bits
