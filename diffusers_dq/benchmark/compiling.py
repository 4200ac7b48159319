# SPDX-License-Identifier: Apache-2.0
"""torch.compile on equal terms: every contestant fullgraph, of the whole model or of its repeated blocks."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import nn

from diffusers_dq.benchmark.settings import Settings


def compile_options(settings: Settings, **options: Any) -> dict[str, Any]:
    return {"fullgraph": True, "backend": settings.backend, **options}


@contextmanager
def many_variants() -> Iterator[None]:
    """Contestants share the code of their model's class: they must not use up each other's recompilations."""
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
        yield


@contextmanager
def kept_inductor_config() -> Iterator[None]:
    """torchao changes Inductor's settings when it converts a model: its own compilation has them, no other has."""
    before = inductor_config.save_config()
    try:
        yield
    finally:
        inductor_config.load_config(before)


@contextmanager
def compiled_anew(config: bytes) -> Iterator[None]:
    """Within, nothing compiled earlier is reused, and Inductor's CPU kernels show up by name in a profile.

    config: what `inductor_config.save_config()` returned when the contestant was made.
    """
    torch._dynamo.reset()
    with kept_inductor_config():
        inductor_config.load_config(config)
        with inductor_config.patch({"cpp.enable_kernel_profile": True}):
            yield


class Compiled:
    """A model that runs compiled inside `with compiled.active():`, and is itself as before outside.

    So that one set of weights serves the eager and the compiled contestant.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        options = compile_options(settings)
        if settings.scope == "model":
            if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # torch 2.12
                options["isolate_recompiles"] = True
            modules = [model]
        else:
            modules = repeated_blocks(model)
        self._calls: dict[nn.Module, Callable[..., Any]] = {
            module: torch.compile(module._call_impl, **options) for module in modules
        }

    @contextmanager
    def active(self) -> Iterator[None]:
        for module, call in self._calls.items():
            module.__dict__["_compiled_call_impl"] = call  # where nn.Module.compile puts it
        try:
            yield
        finally:
            for module in self._calls:
                module.__dict__.pop("_compiled_call_impl", None)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the model's lists of blocks. Raises ValueError where it has none."""
    blocks = [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no list of blocks to compile; use the scope 'model'")
    return blocks
