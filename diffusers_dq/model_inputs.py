# SPDX-License-Identifier: Apache-2.0
"""Whole inputs of a transformer, kept so that a forward can be repeated: for reconstruction, searches and noise
statistics. Latents and embeddings are small beside the activations inside."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ModelInput = dict[str, Any]
"""Arguments of forward by name, so that `model(**input)` repeats it; tensors on the CPU."""

_TENSOR = "tensor"  # key of the one-entry dict that stands for a tensor in `Packed`'s structure
_DICT, _TUPLE = "dict", "tuple"


def capture(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> ModelInput:
    """The arguments of a forward that takes `names`, copied. Raises ValueError for what no file could hold."""
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return {name: _copied(name, value) for name, value in given.items()}


def _copied(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)  # of an expanded one, no stride of 0
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _copied(name, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_copied(name, item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items  # Cosmos takes only a tuple for two contexts
    raise ValueError(
        f"the transformer is called with {name} of type {type(value).__name__}, which a statistics file cannot hold:"
        " calibrate with samples=0, and without methods that need whole inputs"
    )


def moved(value: Any, device: torch.device | str, dtypes: Mapping[torch.dtype, torch.dtype] | None = None) -> Any:
    """The same input with its tensors on a device, and those of a dtype in `dtypes` in the one it maps to."""
    if isinstance(value, Tensor):
        return value.to(device, (dtypes or {}).get(value.dtype, value.dtype))
    if isinstance(value, dict):
        return {key: moved(item, device, dtypes) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device, dtypes) for item in value)
    return value


def timestep_of(sample: ModelInput, name: str) -> Tensor:
    """Its timesteps, [n] fp32. Raises ValueError where it has none, as only a damaged file makes it."""
    if not isinstance(sample.get(name), Tensor | int | float):
        raise ValueError(
            f"a sample has no {name}, it has {', '.join(sample)}: the statistics are damaged; calibrate again"
        )
    return torch.as_tensor(sample[name]).float().reshape(-1)


def pack(samples: Iterable[ModelInput]) -> tuple[list[Any], dict[str, Tensor]]:
    """(JSON-able structures, their tensors by name); equal tensors, as of a prompt at every step, are kept once."""
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], list[str]] = {}

    def packed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {_TENSOR: _name_of(value, tensors, names)}
        if isinstance(value, dict):
            return {_DICT: {key: packed(item) for key, item in value.items()}}
        if isinstance(value, tuple):
            return {_TUPLE: [packed(item) for item in value]}
        return [packed(item) for item in value] if isinstance(value, list) else value

    return [packed(sample) for sample in samples], tensors


def _name_of(tensor: Tensor, tensors: dict[str, Tensor], names: dict[tuple[Any, ...], list[str]]) -> str:
    tensor = tensor.contiguous()
    check = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    alike = names.setdefault((check, tensor.dtype, tuple(tensor.shape)), [])
    found = next((name for name in alike if torch.equal(tensors[name], tensor)), None)
    if found is None:
        found = f"samples/{len(tensors)}"
        tensors[found] = tensor
        alike.append(found)
    return found


def unpack(structures: Sequence[Any], tensors: Mapping[str, Tensor]) -> tuple[ModelInput, ...]:
    """The inverse of `pack`. Raises KeyError for a tensor that is missing, TypeError for what `pack` does not make."""

    def unpacked(value: Any) -> Any:
        if isinstance(value, dict):
            if _TENSOR in value:
                return tensors[value[_TENSOR]]
            if _TUPLE in value:
                return tuple(unpacked(item) for item in value[_TUPLE])
            return {key: unpacked(item) for key, item in value[_DICT].items()}
        return [unpacked(item) for item in value] if isinstance(value, list) else value

    samples = tuple(unpacked(structure) for structure in structures)
    if not all(isinstance(sample, dict) for sample in samples):
        raise TypeError("a sample is an object of a forward's arguments")
    return samples


def places(samples: int, calls: int, steps: int) -> set[tuple[int, int]]:
    """(call, step) of the forwards to keep: steps evenly from first to last, calls in turn."""
    return {(k % calls, int((k + 0.5) * steps / samples)) for k in range(samples)}
