# SPDX-License-Identifier: Apache-2.0
"""What the kernel tests share: every quick form of an op on the same arguments, and memory with guards around it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

Form = Callable[..., Any]


def _move(value: Any, device: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_move(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


@pytest.fixture(scope="session")
def every_form() -> Callable[..., dict[str, Any]]:
    """every_form(op, launcher, *args): results of the CPU form and of the Triton form, by name, on the CPU.

    Triton runs in its interpreter, or where there is a GPU through the dispatcher on CUDA tensors.
    """

    def run(op: Form, launcher: Form, *args: Any) -> dict[str, Any]:
        if torch.cuda.is_available():
            return {"cpu": op(*args), "cuda": _move(op(*(_move(arg, "cuda") for arg in args)), "cpu")}
        return {"cpu": op(*args), "triton interpreter": launcher(*args)}

    return run


@pytest.fixture
def guarded_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every torch.empty has 64 poisoned elements before and after it; they must be untouched in the end."""
    plain_empty, buffers = torch.empty, []

    def guarded_empty(*size: Any, dtype: torch.dtype, device: Any = None) -> Tensor:
        shape = torch.Size(size[0] if isinstance(size[0], tuple | torch.Size) else size)
        buffer = plain_empty(shape.numel() + 128, dtype=dtype, device=device).fill_(77)
        buffers.append(buffer)
        return buffer[64 : 64 + shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    yield
    assert buffers
    for buffer in buffers:
        assert (buffer[:64] == 77).all() and (buffer[-64:] == 77).all()
