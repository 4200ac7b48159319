# SPDX-License-Identifier: Apache-2.0
"""torch.library glue: one call defines an op, its forms on each device and its shape rule.

`Library.impl` and not `custom_op`: a call costs a few microseconds less, and eager DiT steps make hundreds of them.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from . import _triton
from ._gradient import detached, gradient_source, without_gradient

__all__ = ["announce", "backend", "define_op"]

_LIBRARY = Library("diffusers_dq", "DEF")
_LOGGER = logging.getLogger("diffusers_dq_kernels")


@dataclass(frozen=True)
class _Forms:
    cpu: Callable[..., Any] | None
    triton: Callable[..., Any] | None
    cpu_caveat: Callable[[], str | None] | None


_FORMS: dict[str, _Forms] = {}


def define_op(
    schema: str,
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    triton: Callable[..., Any] | None = None,
    compiled: Callable[..., Any] | None = None,
    cpu_caveat: Callable[[], str | None] | None = None,
) -> Callable[..., Any]:
    """Register `diffusers_dq::<schema>`; returns the function that calls it, whose `op` is the overload itself.

    reference: plain torch, any device with fp64.   cpu: the quick CPU form.   triton: the launcher for CUDA tensors.
    fake: shapes and dtypes only, for torch.compile.   compiled: what torch.compile traces in place of the opaque op,
    so that Inductor fuses it with what is around.   cpu_caveat: why `cpu` is slow on this machine, or None.
    """
    name = schema.partition("(")[0]
    _FORMS[name] = _Forms(cpu, triton, cpu_caveat)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _announced(name, reference), "CompositeExplicitAutograd")
    if cpu is not None:
        _LIBRARY.impl(name, cpu, "CPU")
    if triton is not None and _triton.MISSING is None:
        _LIBRARY.impl(name, triton, "CUDA")
    torch.library.register_fake(f"diffusers_dq::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.diffusers_dq, name).default
    _LIBRARY.impl(name, _autograd_form(name, op), "Autograd", with_keyset=True)
    return _entry(name, op, reference, compiled)


def _autograd_form(name: str, op: Any) -> Callable[..., Any]:
    """Of an op that has no gradient: the form below, and in grad mode an error for who asks for one."""

    def run(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            results = op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        source = gradient_source(args) if torch.is_grad_enabled() else None
        return results if source is None else without_gradient(name, results, source)

    return run


def _entry(
    name: str, op: Callable[..., Any], reference: Callable[..., Any], compiled: Callable[..., Any] | None
) -> Callable[..., Any]:
    below_autograd = torch._C._AutoDispatchBelowAutograd
    traced = op if compiled is None else compiled

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return trace(*args)
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return op(*args)
        with below_autograd():  # past the autograd form, a Python function that would have nothing to do
            return op(*args)

    def trace(*args: Any) -> Any:
        source = gradient_source(args) if torch.is_grad_enabled() else None
        return traced(*args) if source is None else without_gradient(name, traced(*detached(args)), source)

    call.__doc__ = reference.__doc__
    call.op = op  # type: ignore[attr-defined]
    return call


def backend(op_name: str, device_type: str) -> tuple[str, str | None]:
    """The form of `op_name` that tensors on `device_type` take, and why it is not the quick one (None when it is).

    The form is "triton", "cpu" or "reference".
    """
    if op_name not in _FORMS:
        raise KeyError(f"no op {op_name!r}; known: {sorted(_FORMS)}")
    forms = _FORMS[op_name]
    if device_type == "cpu" and forms.cpu is not None:
        return "cpu", forms.cpu_caveat() if forms.cpu_caveat else None
    if device_type != "cuda":
        return "reference", f"no kernel for device type {device_type!r}: plain torch in high precision"
    if forms.triton is None:
        return "reference", "no Triton kernel yet: plain torch in high precision"
    if _triton.MISSING is not None:
        return "reference", f"{_triton.MISSING}: plain torch in high precision"
    return "triton", None


@functools.cache
def announce(op_name: str, reason: str) -> None:
    """Warn that `op_name` takes a slow path, once for each reason."""
    _LOGGER.warning("%s: %s", op_name, reason)


def _announced(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as the dispatcher runs it: right everywhere, but never slow in silence."""

    @functools.wraps(reference)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        _, reason = backend(name, first.device.type)
        if reason is not None:
            announce(name, reason)
        return reference(first, *args, **kwargs)

    return run
