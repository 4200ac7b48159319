# SPDX-License-Identifier: Apache-2.0
"""The matrix products of a model's linears, counted; and the bytes its weights take."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class LinearCall:
    """y[m, n] = x[m, k] W^T, m all leading sizes of x."""

    name: str
    m: int
    n: int
    k: int

    @property
    def operations(self) -> int:
        return 2 * self.m * self.n * self.k


def linear_calls(model: nn.Module, run: Callable[[], Any]) -> tuple[list[LinearCall], Any]:
    """Every call of an nn.Linear that `run()` makes, and what run() returned."""
    calls: list[LinearCall] = []

    def hook(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def record(module: Any, args: tuple[Any, ...]) -> None:
            n, k = int(module.out_features), int(module.in_features)
            calls.append(LinearCall(name, args[0].numel() // k, n, k))

        return record

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        return calls, run()
    finally:
        for handle in handles:
            handle.remove()


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers, shared ones once; of a tensor subclass, what it really holds."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(_nbytes(tensor) for tensor in tensors.values())


def _nbytes(tensor: Tensor) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.nbytes
    names, _ = flatten()
    return sum(_nbytes(getattr(tensor, name)) for name in names)
