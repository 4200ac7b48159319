# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a prompt computed once, not at every denoising step.

Cross-attention to text that no block changes and no timestep enters (PixArt, Wan, Sana, LTX, Open-Sora, ...) projects
the same tokens at each step. What the projections put out is kept here for as long as the prompt's embedding lives.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_dq.denoise import argument_names, denoiser
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.specs import TextProjections, spec_of

_MOST_PROMPTS = 4  # kept at a time: with guidance by separate forwards there are two

Key = tuple[tuple[int, int], ...]  # identity and version of each tensor


class TextCache:
    """Undo with `remove()`, or use it as a context manager.

    kept: linears whose outputs are kept.   left: linear -> why its output is not.
    """

    def __init__(self, model: nn.Module, text: TextProjections, stepwise: bool = False) -> None:
        """stepwise: whether activations have other bits in some steps."""
        self.kept: list[str] = []
        self.left: dict[str, str] = {}
        self._positions = [(name, argument_names(model).index(name)) for name in text.arguments]
        self._prompts: dict[Key, dict[str, tuple[torch.Size, Tensor]]] = {}
        self._current: dict[str, tuple[torch.Size, Tensor]] | None = None
        self._handle = model.register_forward_pre_hook(self._on_forward, with_kwargs=True)
        self._wrapped: list[nn.Module] = []
        for name in text.linears:
            linear = model.get_submodule(name)
            linear = getattr(linear, "base_layer", linear)  # adapters come and go, and are computed anew
            if isinstance(linear, QuantizedLinear) and (linear.layout.rounds_input and stepwise or _switches(linear)):
                self.left[name] = "it is rounded otherwise from step to step"
                continue
            linear.forward = partial(_kept, self, name, linear.forward)
            self._wrapped.append(linear)
            self.kept.append(name)

    def __enter__(self) -> "TextCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Forget what was kept; the model computes it at every step again."""
        self._handle.remove()
        self._prompts.clear()
        self._current = None
        for linear in self._wrapped:
            wrapped = vars(linear).pop("forward", None)
            if isinstance(wrapped, partial) and not hasattr(wrapped.args[2], "__self__"):
                linear.forward = wrapped.args[2]  # what an offloading hook had put there
        self._wrapped.clear()

    def _on_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [
            kwargs[name] if name in kwargs else args[i] if i < len(args) else None for name, i in self._positions
        ]
        parts = [part for value in values for part in (value if isinstance(value, tuple | list) else (value,))]
        tensors = [part for part in parts if isinstance(part, Tensor) and not part.is_inference()]
        self._current = None
        if not tensors or torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return
        key = tuple((id(tensor), tensor._version) for tensor in tensors)
        if key not in self._prompts:
            while len(self._prompts) >= _MOST_PROMPTS:
                del self._prompts[next(iter(self._prompts))]
            self._prompts[key] = {}
            for tensor in tensors:  # an address may be used again once its tensor is gone
                weakref.finalize(tensor, self._prompts.pop, key, None)
        self._current = self._prompts[key]

    def output(self, name: str, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self._current is None or torch.compiler.is_compiling():
            return forward(x)
        shape, output = self._current.get(name, (None, None))
        if output is None or shape != x.shape:
            output = forward(x)
            self._current[name] = (x.shape, output)
        return output


def _kept(cache: TextCache, name: str, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return cache.output(name, forward, x)


def _switches(linear: QuantizedLinear) -> bool:
    layout = linear.layout
    return max(layout.bias_groups, layout.range_groups, layout.shift_groups) > 1


def cache_text(pipe_or_transformer: Any, component: str | None = None) -> TextCache:
    """Keep the keys and values of cross-attention to text between the steps of a prompt.

    The outputs are the same tensors as without. Memory: K and V of up to four prompts, in all blocks. Where
    torch.compile traces, everything is computed as before.
    component: of a pipeline with two denoisers, as in `dq.quantize`.
    Raises ValueError for an architecture whose text changes from block to block or with the timestep.
    """
    model = denoiser(pipe_or_transformer, component)
    text = spec_of(model).text
    if text is None:
        raise ValueError(
            f"{type(model).__name__} has no projections that depend on the prompt alone, as far as a spec knows: its"
            " text changes from block to block"
        )
    description = getattr(getattr(model, "hf_quantizer", None), "description", None)
    return TextCache(model, text, stepwise=getattr(description, "step_bits", None) is not None)
