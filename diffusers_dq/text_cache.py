# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a prompt computed once, not at every denoising step.

Cross-attention to text that no block changes and no timestep enters (PixArt, Wan, Sana, LTX, Open-Sora, ...) projects
the same tokens at each step. What the projections put out is kept here for as long as the prompt's embedding lives.
"""

import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_dq.denoise import argument_names, denoiser
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.specs import TextProjections, spec_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Same:
    """By which a tensor is known to hold what it held: the object, its storage, and how often it was written to."""

    reference: weakref.ref[Tensor]
    address: int
    version: int

    @classmethod
    def of(cls, tensor: Tensor, on_death: Callable[[Any], None] | None = None) -> "_Same":
        version = 0 if tensor.is_inference() else tensor._version
        return cls(weakref.ref(tensor, on_death), tensor.data_ptr(), version)

    def holds(self, tensor: Tensor) -> bool:
        version = 0 if tensor.is_inference() else tensor._version
        return self.reference() is tensor and (self.address, self.version) == (tensor.data_ptr(), version)


@dataclass(frozen=True)
class _Output:
    """Of a linear, for an input of this shape and dtype."""

    value: Tensor
    input: tuple[torch.Size, torch.dtype]
    parameters: tuple[_Same, ...]


@dataclass(eq=False)
class _Prompt:
    """text: what the model was called with, None where an argument was not given.   outputs: by linear."""

    text: tuple[_Same | None, ...]
    outputs: dict[str, _Output] = field(default_factory=dict)

    def is_of(self, parts: list[Tensor | None]) -> bool:
        return len(parts) == len(self.text) and all(
            part is None if same is None else part is not None and same.holds(part)
            for same, part in zip(self.text, parts, strict=True)
        )


class TextCache:
    """Undo with `remove()`, or use it as a context manager. A copy of the model has an empty cache of its own.

    left: linear -> why its output is not kept.   prompts: most that are kept at a time.
    """

    def __init__(self, model: nn.Module, text: TextProjections, *, prompts: int = 2, stepwise: bool = False) -> None:
        """stepwise: whether activations have other bits in some steps."""
        self.left: dict[str, str] = {}
        self.prompts = prompts
        self._arguments = [(name, argument_names(model).index(name)) for name in text.arguments]
        self._linears: dict[str, nn.Module] = {}
        self._open = True
        self._forget()
        for name in text.linears:
            linear = model.get_submodule(name)
            linear = getattr(linear, "base_layer", linear)  # adapters come and go, and are computed anew
            if isinstance(linear, QuantizedLinear) and (linear.layout.rounds_input and stepwise or _switches(linear)):
                self.left[name] = "it is rounded otherwise from step to step"
                continue
            linear.forward = partial(_kept, self, name, linear.forward)
            self._linears[name] = linear
        self._handles = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        )

    def __enter__(self) -> "TextCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def kept(self) -> list[str]:
        """Linears whose outputs are kept."""
        return list(self._linears)

    @property
    def nbytes(self) -> int:
        """Of all outputs that are kept now."""
        with self._lock:
            return sum(output.value.nbytes for prompt in self._known for output in prompt.outputs.values())

    def remove(self) -> None:
        """Forget what was kept; the model computes it at every step again."""
        self._open = False
        for handle in self._handles:
            handle.remove()
        for linear in self._linears.values():
            mine = vars(linear).get("forward")
            if isinstance(mine, partial) and mine.func is _kept and mine.args[0] is self:  # else under another's hook
                before = mine.args[2]
                del linear.forward
                if getattr(before, "__func__", None) is not type(linear).forward:
                    linear.forward = before
        self._linears.clear()
        self._forget()

    def _forget(self) -> None:
        self._known: list[_Prompt] = []  # the one used last is the last
        self._current: dict[int, _Prompt] = {}  # by thread, while a forward is running
        self._lock = threading.RLock()
        self._said = False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_known", "_current", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return
        given = (kwargs[name] if name in kwargs else args[i] if i < len(args) else None for name, i in self._arguments)
        parts = [part for value in given for part in (value if isinstance(value, tuple | list) else (value,))]
        tensors = [part if isinstance(part, Tensor) else None for part in parts]
        if any(tensor.is_inference() for tensor in tensors if tensor is not None):
            self._say("the prompt was embedded under torch.inference_mode, so a change of it could not be seen")
        elif any(tensor is not None for tensor in tensors):
            self._current[threading.get_ident()] = self._prompt_of(tensors)

    def _after(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._current.pop(threading.get_ident(), None)

    def _prompt_of(self, tensors: list[Tensor | None]) -> _Prompt:
        with self._lock:
            found = next((prompt for prompt in self._known if prompt.is_of(tensors)), None)
            if found is None:
                same = tuple(None if tensor is None else _Same.of(tensor, self._on_death) for tensor in tensors)
                found = _Prompt(same)
                if len(self._known) >= self.prompts:
                    self._say(f"more than {self.prompts} prompts in turn: the one used longest ago is computed again")
            else:
                self._known.remove(found)
            self._known = [*self._known[-(self.prompts - 1) :], found] if self.prompts > 1 else [found]
            return found

    def _on_death(self, reference: Any) -> None:
        with self._lock:
            self._known = [
                prompt
                for prompt in self._known
                if not any(same is not None and same.reference is reference for same in prompt.text)
            ]

    def _say(self, why: str) -> None:
        if not self._said:
            logger.warning("text is projected at every step: %s", why)
            self._said = True

    def output(self, name: str, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Of a linear: what it put out for this prompt before, if nothing has changed since."""
        if torch.compiler.is_compiling():
            return forward(x)
        prompt = self._current.get(threading.get_ident()) if self._open else None
        if prompt is None:
            return forward(x)
        linear, kept = self._linears[name], prompt.outputs.get(name)
        parameters = list(linear.parameters(recurse=False))
        if (
            kept is None
            or kept.input != (x.shape, x.dtype)
            or not all(same.holds(p) for same, p in zip(kept.parameters, parameters, strict=True))
        ):
            value = forward(x)
            kept = _Output(value, (x.shape, x.dtype), tuple(_Same.of(p) for p in linear.parameters(recurse=False)))
            prompt.outputs[name] = kept
        return kept.value


def _kept(cache: TextCache, name: str, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return cache.output(name, forward, x)


def _switches(linear: QuantizedLinear) -> bool:
    layout = linear.layout
    return max(layout.bias_groups, layout.range_groups, layout.shift_groups) > 1


def cache_text(pipe_or_transformer: Any, component: str | None = None, *, prompts: int = 2) -> TextCache:
    """Keep the keys and values of cross-attention to text between the steps of a prompt.

    The outputs are the same tensors as without. Call it once the model is quantized. Memory: K and V of every block,
    for `prompts` prompts, which is `TextCache.nbytes`: 0.84 GB a prompt of 512 tokens for Wan 14B in bf16, by its
    shapes. Two are enough for one call of a pipeline whose guidance runs the model twice a step.
    Computed as before are: what torch.compile traces, forwards with gradients, prompts embedded under inference_mode
    (a warning says so), and linears whose weight has been exchanged or written to since, other than through `.data`.
    component: of a pipeline with two denoisers, as in `dq.quantize`.
    Raises ValueError for an architecture whose text changes from block to block or with the timestep.
    """
    if prompts < 1:
        raise ValueError(f"prompts must be at least 1, got {prompts}")
    model = denoiser(pipe_or_transformer, component)
    text = spec_of(model).text
    if text is None:
        raise ValueError(
            f"{type(model).__name__} has no projections that depend on the prompt alone, as far as a spec knows: its"
            " text changes from block to block"
        )
    description = getattr(getattr(model, "hf_quantizer", None), "description", None)
    return TextCache(model, text, prompts=prompts, stepwise=getattr(description, "step_bits", None) is not None)
