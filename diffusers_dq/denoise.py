# SPDX-License-Identifier: Apache-2.0
"""Drives a pipeline through its denoising steps as its user would, and says which timestep each forward is at."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

Call = Mapping[str, Any]

_TIMESTEP_NAMES = ("timestep", "timesteps", "t")
_TIMESTEP_ENDINGS = ("_timestep", "_timesteps", "_time")  # of models that take one for each of several modalities


DENOISERS = "transformer", "transformer_2"


def denoiser(pipe_or_model: Any, component: str | None = None) -> ModelMixin:
    """The transformer that denoises, without a wrapper of torch.compile.

    component: which of a pipeline that has two, "transformer" or "transformer_2" (Wan 2.2: noisy and clean steps).
    Raises ValueError where there is none, or where there are two and none is chosen.
    """
    pipe_or_model = getattr(pipe_or_model, "_orig_mod", pipe_or_model)
    if isinstance(pipe_or_model, DiffusionPipeline):
        there = [name for name in DENOISERS if getattr(pipe_or_model, name, None) is not None]
        if component is None and len(there) > 1:
            raise ValueError(
                f"{type(pipe_or_model).__name__} has two denoisers, each with steps and statistics of its own: say"
                " component='transformer' or component='transformer_2', and do the same for the other"
            )
        if component is not None and component not in there:
            raise ValueError(f"component {component!r} of {type(pipe_or_model).__name__} is none of {there}")
        transformer = getattr(pipe_or_model, component or (there or DENOISERS)[0], None)
        transformer = getattr(transformer, "_orig_mod", transformer)
        if not isinstance(transformer, nn.Module):
            parts = ", ".join(sorted(pipe_or_model.components))
            raise ValueError(
                f"{type(pipe_or_model).__name__} has no transformer (its components: {parts}); diffusers_dq quantizes"
                " diffusion transformers"
            )
        return transformer
    if component is not None:
        raise ValueError(f"component is of a pipeline, got a {type(pipe_or_model).__name__} and {component!r}")
    if isinstance(pipe_or_model, ModelMixin):
        TimestepArgument.of(pipe_or_model)
        return pipe_or_model
    raise ValueError(f"expected a diffusers pipeline or transformer, got {type(pipe_or_model).__name__}")


def argument_names(model: nn.Module) -> list[str]:
    """Of the forward of the model's class, in order."""
    return [name for name in inspect.signature(type(model).forward).parameters if name != "self"]


@dataclass(frozen=True)
class TimestepArgument:
    """Where a model's forward takes its timestep; read without `inspect`, so that torch.compile can trace it.

    others: names and positions of further ones, where each modality has its own (Cosmos 3): they are read where a call
        has none of those before.
    """

    name: str
    position: int
    others: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> "TimestepArgument":
        """Raises ValueError where no argument is named like one."""
        names = argument_names(model)
        places = {name: position for position, name in enumerate(names)}
        found = [name for name in names if name in _TIMESTEP_NAMES][:1]
        found = found or [name for name in names if name.endswith(_TIMESTEP_ENDINGS)]
        if not found:
            raise ValueError(
                f"{type(model).__name__}.forward has no argument named {' or '.join(_TIMESTEP_NAMES)}, or ending in"
                f" {' or '.join(_TIMESTEP_ENDINGS)} (it takes {', '.join(names)}), so its denoising step cannot be"
                " known"
            )
        first, *others = found
        return cls(first, places[first], tuple((name, places[name]) for name in others))

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The value passed, or None: also where it is a tensor of no timesteps, as of a modality without noise."""
        for name, position in ((self.name, self.position), *self.others):
            value = args[position] if position < len(args) else kwargs.get(name)
            if value is not None and not (isinstance(value, Tensor) and value.numel() == 0):
                return value
        return None


@contextmanager
def watching_timestep(
    model: nn.Module, on_forward: Callable[[float], None], descending: bool = True
) -> Iterator[None]:
    """Call `on_forward(timestep)` before each forward. Where tokens differ, the timestep of the noisiest: the largest
    where noise falls with the timestep (descending), else the smallest."""
    argument = TimestepArgument.of(model)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = argument.read(args, kwargs)
        if value is None:
            raise ValueError(f"{type(module).__name__} was called without a {argument.name}; pass one")
        if isinstance(value, Tensor):
            value = value.float().amax() if descending else value.float().amin()
        on_forward(float(value))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def check_calls(pipe: DiffusionPipeline, calls: Sequence[Call]) -> None:
    """Raises TypeError or ValueError before anything runs where a call would not be accepted by `pipe(...)`."""
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(f"expected a diffusers pipeline, which makes the calls; got {type(pipe).__name__}")
    if not isinstance(calls, Sequence) or not calls or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(
            f"calls must be a non-empty list of dicts, one a call of the pipeline; got {repr(calls)[:80]}"
            f" ({type(calls).__name__})"
        )
    signature = inspect.signature(pipe.__call__)
    for i, call in enumerate(calls):
        if "num_inference_steps" in call:
            raise ValueError(f"calls[{i}] sets num_inference_steps; pass it to the function instead, for all calls")
        if "return_dict" in call:
            raise ValueError(f"calls[{i}] sets return_dict, which is set for it; leave it out")
        try:
            signature.bind(**call)
        except TypeError as error:
            known = ", ".join(name for name in signature.parameters if name not in ("args", "kwargs"))
            raise TypeError(f"calls[{i}]: {error}. {type(pipe).__name__} takes: {known}") from None


def run_call(pipe: DiffusionPipeline, call: Call, *, num_inference_steps: int, seed: int, **defaults: Any) -> Any:
    """One `pipe(**call)` under a CPU generator, so that a seed means the same noise on every device.

    defaults: further arguments, given where the pipeline knows them and the call does not set them.
    Returns the images or frames of the output. Some pipelines (DiT's) keep the generator from a scheduler that adds
    noise of its own; it draws on torch's global one, which is seeded too and then put back.
    """
    known = inspect.signature(pipe.__call__).parameters
    arguments = {"generator": torch.Generator().manual_seed(seed), **defaults}
    arguments = {name: value for name, value in arguments.items() if name in known} | dict(call)
    with torch.random.fork_rng(devices=cuda_devices(pipe)):
        torch.manual_seed(seed)
        return pipe(**arguments, num_inference_steps=num_inference_steps, return_dict=False)[0]


def cuda_devices(pipe: DiffusionPipeline) -> list[torch.device]:
    """Those that the pipeline runs on, for `torch.random.fork_rng`."""
    return [pipe.device] if pipe.device.type == "cuda" else []


@contextmanager
def quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """Without the pipeline's own progress bar, for the time being."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before
