# SPDX-License-Identifier: Apache-2.0
"""Quantized ops have no gradient: rounding has none, and weights are integers. Asking for one is an error.

The forward runs with grad mode on, since pipelines of nn.Modules often do. A result then remembers a source, an input
that wanted a gradient: a floating-point one in its grad_fn, which raises, and one of integers, of which autograd keeps
no record, in an attribute, which the next op finds. So the error comes when backward reaches the last op of a layer.
Who slices or copies the integers on the way to the next op leaves the attribute behind, and with it the error.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import Library

__all__ = ["detached", "gradient_source", "without_gradient"]

_LIBRARY = Library("diffusers_dq", "FRAGMENT")
_SOURCE = "_diffusers_dq_gradient_source"
Results = TypeVar("Results", Tensor, tuple[Tensor, ...])


def gradient_source(args: Iterable[Any]) -> Tensor | None:
    """The first of an op's arguments that wants a gradient, or the input that it was rounded from."""
    for arg in args:
        if isinstance(arg, Tensor):
            source = arg if arg.requires_grad else getattr(arg, _SOURCE, None)
            if source is not None:
                return source
    return None


def detached(args: Iterable[Any]) -> list[Any]:
    """The arguments of an op, none of which wants a gradient."""
    return [arg.detach() if isinstance(arg, Tensor) and arg.requires_grad else arg for arg in args]


def without_gradient(op_name: str, results: Results, source: Tensor) -> Results:
    """The results of `op_name`, computed apart from autograd, such that backward to `source` is a RuntimeError."""
    if isinstance(results, Tensor):
        return _without_gradient(op_name, results, source)
    return tuple(_without_gradient(op_name, result, source) for result in results)


def _without_gradient(op_name: str, result: Tensor, source: Tensor) -> Tensor:
    if result.is_floating_point():
        return _Refusing.apply(result, source, op_name)
    result = result.view_as(result)  # torch.compile sets attributes of no tensor that came in a tuple from an op
    setattr(result, _SOURCE, source)
    return result


class _Refusing(torch.autograd.Function):
    """result as it is, a function of source whose backward raises.

    By way of an op: torch.compile traces backward together with forward, where raising would keep it from compiling.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, source: Tensor, op_name: str) -> Tensor:
        ctx.op_name, ctx.size = op_name, source.shape
        ctx.mark_dirty(result)  # itself and no view of it, which would refuse to be written to
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        return None, torch.ops.diffusers_dq.refuse_gradient(gradients[0], ctx.size, ctx.op_name), None


def _refuse_gradient(gradient: Tensor, size: list[int], op_name: str) -> Tensor:
    raise RuntimeError(
        f"diffusers_dq::{op_name} has no gradient: quantized layers are for inference. Run the pipeline under"
        " torch.no_grad() or torch.inference_mode(); for gradients, dequantize the model or use the original one."
    )


def _refuse_gradient_fake(gradient: Tensor, size: list[int], op_name: str) -> Tensor:
    return gradient.new_empty(size)


_LIBRARY.define("refuse_gradient(Tensor gradient, SymInt[] size, str op_name) -> Tensor")
_LIBRARY.impl("refuse_gradient", _refuse_gradient, "CompositeExplicitAutograd")
torch.library.register_fake("diffusers_dq::refuse_gradient", _refuse_gradient_fake, lib=_LIBRARY)
