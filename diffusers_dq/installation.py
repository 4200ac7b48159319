# SPDX-License-Identifier: Apache-2.0
"""Puts quantized layers into a model, and describes them so that a fresh process can make the same model from a file.

The description is `DQConfig.result`, in config.json: {"linears": name -> layout, "attention": [modules],
"attention_bits", "boundaries": [P, E], "descending", "tied": copy -> original, "notes": name -> reason,
"dtype", "table_dtype"}.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_dq import attention
from diffusers_dq.denoise import TimestepArgument
from diffusers_dq.linear import LinearLayout, QuantizedLinear
from diffusers_dq.timesteps import TimestepGroups

GROUPS = "timestep_groups"
BOUNDARIES = "timestep_boundaries"


class SelectGroup:
    """Forward pre-hook of the model: writes the group of this forward's timestep where the layers read it."""

    def __init__(self, argument: TimestepArgument, descending: bool) -> None:
        self.argument = argument
        self.descending = descending

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = self.argument.read(args, kwargs)
        if timestep is None:
            raise ValueError(
                f"{type(model).__name__} was called without a {self.argument.name}; it was quantized by timestep group"
                " and needs one"
            )
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep)
        getattr(model, GROUPS).select(getattr(model, BOUNDARIES), timestep, self.descending)


def install(
    model: nn.Module,
    layers: Mapping[str, QuantizedLinear],
    groups: TimestepGroups,
    boundaries: Tensor,
    descending: bool,
    tied: Mapping[str, str],
) -> None:
    """Replace linears by layers, share tied modules, and select the timestep group before each forward.

    boundaries: [P, E]; without columns there is one group and nothing to select.
    """
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    for copied, original in tied.items():
        model.set_submodule(copied, model.get_submodule(original))
    model.add_module(GROUPS, groups)
    if boundaries.numel():
        model.register_buffer(BOUNDARIES, boundaries)
        select = SelectGroup(TimestepArgument.of(model), descending)
        model.register_forward_pre_hook(select, with_kwargs=True)


def uninstall(model: nn.Module, result: Mapping[str, Any]) -> None:
    """Undo `install` except for the layers: hook, buffers, shared modules, attention processors."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, SelectGroup):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for name in (GROUPS, BOUNDARIES):
        if hasattr(model, name):
            delattr(model, name)
    for copied, original in result.get("tied", {}).items():
        model.set_submodule(copied, copy.deepcopy(model.get_submodule(original)))
    for name in result.get("attention", ()):
        attention.detach(model.get_submodule(name))


def identical(model: nn.Module, duplicates: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Of (copy, original) modules, those whose tensors are equal bit for bit: worth storing once."""
    return {copied: original for copied, original in duplicates if _equal(model, copied, original)}


def _equal(model: nn.Module, copied: str, original: str) -> bool:
    ours, theirs = (model.get_submodule(name).state_dict() for name in (copied, original))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def describe(
    layers: Mapping[str, QuantizedLinear],
    attention_modules: Sequence[str],
    attention_bits: int,
    boundaries: Tensor,
    descending: bool,
    tied: Mapping[str, str],
    notes: Mapping[str, str],
    dtype: torch.dtype,
) -> dict[str, Any]:
    return {
        "linears": {name: layer.layout.to_dict() for name, layer in layers.items()},
        "attention": list(attention_modules),
        "attention_bits": attention_bits,
        "partitions": list(boundaries.shape),
        "descending": descending,
        "tied": dict(tied),
        "notes": dict(notes),
        "dtype": str(dtype).removeprefix("torch."),
    }


def install_skeleton(model: nn.Module, result: Mapping[str, Any]) -> None:
    """Give a model on the meta device the layers of a saved one, tensors still to come.

    Raises ValueError where the description names a linear that the model lacks.
    """
    partitions, edges = result["partitions"]
    groups = TimestepGroups(partitions)
    dtype = getattr(torch, result["dtype"])
    layers = {}
    for name, layout in result["linears"].items():
        linear = _linear(model, name)
        layers[name] = QuantizedLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            LinearLayout(**layout),
            groups,
            device="meta",
            dtype=dtype,
        )
    boundaries = torch.empty(partitions, edges, device="meta")
    install(model, layers, groups, boundaries, result["descending"], result["tied"])
    for name in result["attention"]:
        attention.attach(model.get_submodule(name), result["attention_bits"], None, "meta")


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"the saved quantization names {name}, which is no linear of this {type(model).__name__}: config.json and"
            " model class do not belong together"
        )
    return module


def is_own(model: nn.Module, name: str) -> bool:
    """Whether a tensor is one of ours, which diffusers must not cast on loading: integers and fp32 tables."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, QuantizedLinear):
        return leaf in dict(module.tables()) or (leaf == "weight" and module.layout.rounds_weight)
    return name == BOUNDARIES or attention.owns(module, leaf)
