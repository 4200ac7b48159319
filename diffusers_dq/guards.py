# SPDX-License-Identifier: Apache-2.0
"""What diffusers and peft do to a loaded model that would be silently wrong, or half done, on a quantized one.

Each is allowed where it is exact and refused with a reason where it is not. Diffusers' own classes stay as they are: a
quantized model is of a class that is made of its own.
"""

import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.saving import save_whole

_METHOD = "_diffusers_dq_method"  # attribute of a model with guards: what quantized it
_LAYERWISE = "_skip_layerwise_casting_patterns"  # where diffusers looks for what enable_layerwise_casting leaves alone
_OF_A_PUSH = ("repo_id", "commit_message", "private", "token", "create_pr")  # arguments of save_pretrained
_CARRIES_NOTHING = "'rtn', 'qdiffusion', 'quarot' or 'qdit'"
_KNOWN_TUNERS = ("peft.tuners.lora.", "peft.tuners.loha.", "peft.tuners.lokr.")


class _StandsFor(type):
    """Of classes that equal the one they are made of: `from_pipe` looks for a model's very class in a list."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__bases__[1]

    def __hash__(cls) -> int:
        return hash(cls.__bases__[1])


class Guarded:
    """What a quantized model is besides its own class, which it goes back to when it is dequantized.

    A class, and no attributes of the model: they would have to hold it, as in `from_pretrained(...).to("cuda")`
    nothing else does by the time of the call, and two that hold each other are freed only when the collector runs.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes that are made while a program runs have no name by which a pickle, or a copy, could find them."""
        made: Any = super().__reduce_ex__(protocol)
        _, (kind, *arguments), *rest = made
        return _new, (kind.__bases__[1], *arguments), *rest


@functools.cache
def _guarded(kind: Any) -> Any:
    """A class of the same name, the guarded methods of which ask first.   kind: of a model that is not quantized."""
    own = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    methods = {name: _guard(name, getattr(kind, name)) for name in _GUARDS if hasattr(kind, name)}
    return _StandsFor(kind.__name__, (Guarded, kind), own | methods)


def _new(kind: type, *arguments: Any) -> Any:
    made = _guarded(kind)
    return made.__new__(made, *arguments)


def _guard(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)  # pipelines look at its arguments
    def guarded(model: Any, *args: Any, **kwargs: Any) -> Any:
        method = vars(model).get(_METHOD)
        if method is None:  # type(model).from_pretrained(...) makes models of this class that may not be quantized
            return plain(model, *args, **kwargs)
        return _GUARDS[name](model, plain, method, *args, **kwargs)

    return guarded


def protect(model: nn.Module, method: str) -> None:
    """Put the guards on a model that `method` has quantized."""
    kept = tuple(getattr(type(model), _LAYERWISE, None) or ())
    kind: Any = type(model)
    if not isinstance(model, Guarded):
        model.__class__ = _guarded(kind)
    setattr(model, _METHOD, method)
    quantized = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    setattr(model, _LAYERWISE, (*kept, *(rf"^{re.escape(name)}(\.base_layer)?$" for name in quantized)))
    changed = [name for name in quantized if _changed(model.get_submodule(name))]
    if changed and not any(isinstance(hook, RefuseAdapters) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(RefuseAdapters(changed, method))


def unprotect(model: nn.Module) -> None:
    """Take them off again."""
    if isinstance(model, Guarded):
        model.__class__ = type(model).__bases__[1]
    vars(model).pop(_METHOD, None)
    vars(model).pop(_LAYERWISE, None)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, RefuseAdapters):
            del model._forward_pre_hooks[key]


class RefuseAdapters:
    """Forward pre-hook of the model: no adapter may sit where another layer has been given part of this one's
    function. Diffusers' own loaders are stopped before; peft's can be called on any module.

    Left out of compiled graphs of the whole model.
    """

    def __init__(self, names: list[str], method: str) -> None:
        self.names = names
        self.method = method
        self._places: list[tuple[dict[str, Any], str, str]] | None = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        if self._places is None:
            modules = dict(model.named_modules())
            parents = [(name, *name.rpartition(".")[::2]) for name in self.names]
            # a parent that is gone has been replaced, its linears with it
            self._places = [
                (modules[parent]._modules, leaf, name) for name, parent, leaf in parents if parent in modules
            ]
        for siblings, leaf, name in self._places:
            module = siblings.get(leaf)
            if module is not None and type(module) is not QuantizedLinear:
                layer = _base(module)
                if isinstance(layer, QuantizedLinear) and _changed(layer):
                    raise ValueError(_why_changed(name, layer, self.method))

    def __deepcopy__(self, memo: dict[int, Any]) -> "RefuseAdapters":
        return RefuseAdapters(self.names, self.method)

    def __reduce__(self) -> tuple[type, tuple[list[str], str]]:
        return RefuseAdapters, (self.names, self.method)


def _to(model: nn.Module, plain: Callable[..., Any], method: str, *args: Any, **kwargs: Any) -> Any:
    """Casting to the dtype it has is no cast: `from_pipe` and `save_lora_adapter` do it."""
    named = [x.dtype if isinstance(x, torch.Tensor) else x for x in (*args, kwargs.get("dtype"), kwargs.get("tensor"))]
    asked = [x for x in named if isinstance(x, torch.dtype)]
    if asked and asked[0] != model.dtype:
        raise ValueError(
            f"a quantized model cannot be cast: this {type(model).__name__} computes in {model.dtype}, asked for is"
            f" {asked[0]}. Load it with dtype={asked[0]}; to make another pipeline of its parts,"
            f" from_pipe(pipe, torch_dtype={model.dtype}), which casts to float32 unless told otherwise"
        )
    kwargs.pop("dtype", None)
    args = tuple(x for x in args if x is not None and not isinstance(x, torch.dtype))
    return plain(model, *args, **kwargs) if args or kwargs else model


def _save_config(model: nn.Module, plain: Callable[..., Any], method: str, *args: Any, **kwargs: Any) -> Any:
    """With the checksum of the weights that are saved next, by which files that do not belong together are noticed."""
    model.hf_quantizer.seal(model)  # type: ignore[operator, union-attr]
    return plain(model, *args, **kwargs)


def _save_pretrained(
    model: nn.Module,
    plain: Callable[..., Any],
    method: str,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *args: Any,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Each process holds the whole model, so the main one alone writes it. What is pushed is saved here first."""
    pushed = {name: kwargs.pop(name) for name in _OF_A_PUSH if name in kwargs}
    if not is_main_process:
        return
    save_whole(lambda folder: plain(model, folder, is_main_process, *args, **kwargs), save_directory)
    if push_to_hub:
        repo_id = pushed.pop("repo_id", Path(os.path.realpath(save_directory)).name)
        model.push_to_hub(repo_id, variant=kwargs.get("variant"), **pushed)  # type: ignore[operator]


def _fuse_qkv(model: nn.Module, plain: Callable[..., Any], method: str, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        f"fuse_qkv_projections joins weights without their scales, which would ruin this quantized"
        f" {type(model).__name__}. It has nothing to gain either: linears that read one input round it once"
    )


def _fuse_lora(model: nn.Module, plain: Callable[..., Any], method: str, *args: Any, **kwargs: Any) -> Any:
    name = next((name for name, _, layer in _adapted(model) if isinstance(layer, QuantizedLinear)), None)
    if name is not None:
        raise ValueError(
            f"fuse_lora cannot add an adapter to the rounded weight of {name}. Leave the adapter loaded beside it, or"
            " fuse it into the full-precision model (pipe.fuse_lora(), pipe.unload_lora_weights()) and quantize that"
        )
    return plain(model, *args, **kwargs)


def _add_adapter(model: nn.Module, plain: Callable[..., Any], method: str, *args: Any, **kwargs: Any) -> Any:
    """Raises ValueError where an adapter would be wrong, with the model as it was before."""
    adapters = set(getattr(model, "peft_config", {}))
    wrapped = {name for name, _, _ in _adapted(model)}
    try:
        result = plain(model, *args, **kwargs)
        for name, wrapper, layer in _adapted(model):
            if isinstance(layer, QuantizedLinear):
                _check(name, wrapper, layer, method)
    except BaseException:
        _remove_adapters(model, adapters, wrapped)
        raise
    return result


def _check(name: str, wrapper: nn.Module, layer: QuantizedLinear, method: str) -> None:
    if _changed(layer):
        raise ValueError(_why_changed(name, layer, method))
    variants = getattr(wrapper, "lora_variant", None)
    if variants or not type(wrapper).__module__.startswith(_KNOWN_TUNERS):
        kind = type(next(iter(variants.values()))) if variants else type(wrapper)
        raise ValueError(
            f"the adapter on {name} is a {kind.__module__}.{kind.__qualname__}, which computes with the weight of the"
            " layer; a quantized one has only integers to show. LoRA without DoRA, LoHa and LoKr work; fuse others"
            " into the full-precision model and quantize that"
        )


def _remove_adapters(model: Any, adapters: set[str], wrapped: set[str]) -> None:
    """All but these, and the wrappers of layers other than these."""
    for name, _, layer in list(_adapted(model)):
        if name not in wrapped:
            model.set_submodule(name, layer)
    for adapter in set(getattr(model, "peft_config", {})) - adapters:
        model.delete_adapters(adapter)
    if not getattr(model, "peft_config", True):
        del model.peft_config
        model._hf_peft_config_loaded = False


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Name, wrapper and what is inside, of each module that peft has put something around."""
    for name, module in model.named_modules():
        layer = _base(module)
        if layer is not module and not name.endswith(".base_layer"):
            yield name, module, layer


def _base(module: nn.Module) -> nn.Module:
    while (inner := module._modules.get("base_layer")) is not None:
        module = inner
    return module


def _changed(layer: Any) -> bool:
    """Whether it reads or puts out something else than the linear it was made of."""
    return layer.layout.input_carried or layer.layout.carries


def _why_changed(name: str, layer: QuantizedLinear, method: str) -> str:
    what = "reads an input that another layer has transformed" if layer.layout.input_carried else "puts out values"
    rest = "" if layer.layout.input_carried else " that are transformed for the layer after it"
    return (
        f"method {method!r} has folded transforms into this model: {name} {what}{rest}, and an adapter trained on the"
        " original would be wrong there. Fuse the adapter into the full-precision model (pipe.fuse_lora(),"
        f" pipe.unload_lora_weights()) and quantize that, or quantize with fold=False, which makes every"
        f" transform in the layer that asks for it, or with a method that has none: {_CARRIES_NOTHING}"
    )


_GUARDS: dict[str, Callable[..., Any]] = {
    "to": _to,
    "save_config": _save_config,
    "save_pretrained": _save_pretrained,
    "fuse_qkv_projections": _fuse_qkv,
    "fuse_lora": _fuse_lora,
    "load_lora_adapter": _add_adapter,
    "add_adapter": _add_adapter,
}
