# SPDX-License-Identifier: Apache-2.0
"""A model as it is now, to go back to whatever happens while it is changed."""

from collections import OrderedDict
from typing import Any

from torch import nn

_REFILLED = (dict, OrderedDict, set, list)  # of an attribute: others, as handles of hooks, hold the very object


class Snapshot:
    """Attributes, submodules, tensors, buffers and hooks of every module, and where the tensors' values are.

    No values are copied: what changes tensors in place is not undone. What the model lets go of meanwhile is held.
    others: objects with attributes that change along with it.
    """

    def __init__(self, model: nn.Module, *others: Any) -> None:
        self._classes = [(module, type(module)) for module in model.modules()]
        self._attributes = [(vars(owner), dict(vars(owner))) for owner in (*model.modules(), *others)]
        self._containers = [
            (value, value.copy())
            for _, attributes in self._attributes
            for value in attributes.values()
            if type(value) in _REFILLED
        ]
        self._values = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]

    def restore(self) -> None:
        """Also where it is interrupted: that Ctrl-C is not the first."""
        while True:
            try:
                self._restore()
            except KeyboardInterrupt:
                continue
            return

    def _restore(self) -> None:
        for module, kind in self._classes:
            module.__class__ = kind
        for current, attributes in self._attributes:
            current.clear()
            current.update(attributes)
        for container, content in self._containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        for tensor, data in self._values:
            if tensor.data_ptr() != data.data_ptr():
                tensor.data = data
