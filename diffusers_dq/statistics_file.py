# SPDX-License-Identifier: Apache-2.0
"""The safetensors file of statistics: where it is, what stands in it, and that it is nothing else.

Notation: S calibrated steps, K channels, R sampled tokens. The header is {"format_version", "about", "sites": {name:
linears}, "samples": structures of model_inputs.py}. Tensors are `timesteps` [S] fp32, `fingerprint` [F] fp32, of each
site `name/min` and `name/max` [S, K] fp32, `name/tokens` [S, R, K] bf16, `name/keys` [S, R] fp32, with second moments
`name/sums` [S, K] fp32, `name/counts` [S] int64 and `name/products` [K, K] fp32, and those of the samples.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_dq.files import check_writable, read_tensors, write_tensors
from diffusers_dq.model_inputs import ModelInput, pack, unpack
from diffusers_dq.repository import fetch, split_repository

FORMAT_VERSION = 1
FILENAME = "statistics.safetensors"  # in a repository on the Hub
MOMENTS = ("sums", "counts", "products")
_SITE_TENSORS = ("min", "max", "tokens", "keys")


class Content(NamedTuple):
    """What a file holds. linears: by site, who reads it.   sites: the tensors of each, in the order named above."""

    about: Mapping[str, Any]
    timesteps: Tensor
    fingerprint: Tensor
    linears: Mapping[str, tuple[str, ...]]
    sites: Mapping[str, Mapping[str, Tensor]]
    samples: tuple[ModelInput, ...]


def write(path: str | os.PathLike[str], content: Content) -> None:
    """One file; an existing one is replaced only once the new one is whole on disk."""
    tensors = {"timesteps": content.timesteps, "fingerprint": content.fingerprint}
    for name, site in content.sites.items():
        tensors |= {f"{name}/{key}": value for key, value in site.items()}
    structures, of_samples = pack(content.samples)
    tensors |= of_samples
    header = {
        "format_version": FORMAT_VERSION,
        "samples": structures,
        "about": dict(content.about),
        "sites": {name: list(linears) for name, linears in content.linears.items()},
    }
    write_tensors(check_writable(path), tensors, header)


def read(path: str | os.PathLike[str]) -> Content:
    """Raises FileNotFoundError, and ValueError where the file is not a whole, known statistics file."""
    try:
        header, tensors = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; calibrate again") from error
    if not isinstance(header, dict) or not {"format_version", "about", "sites"} <= header.keys():
        raise ValueError(f"{path} is a safetensors file, but not one of statistics; expected one from dq.calibrate")
    if header["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path} has statistics format {header['format_version']}, this diffusers_dq reads up to"
            f" {FORMAT_VERSION}: upgrade diffusers_dq"
        )
    _check_header(path, header)
    moments = MOMENTS if header["about"].get("second_moments") else ()
    kinds = {name: _SITE_TENSORS + (moments if linears else ()) for name, linears in header["sites"].items()}
    expected = {"timesteps", "fingerprint"} | {f"{name}/{key}" for name in kinds for key in kinds[name]}
    try:
        samples = unpack(header.get("samples", []), tensors)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not hold the samples its header names ({error!r}); calibrate again") from None
    of_sites = {key for key in tensors if not key.startswith("samples/")}
    if expected != of_sites:
        odd = sorted(expected ^ of_sites)
        raise ValueError(f"{path} does not hold the tensors its header names; missing or extra: {odd[:5]}")
    content = Content(
        about=header["about"],
        timesteps=tensors["timesteps"],
        fingerprint=tensors["fingerprint"],
        linears={name: tuple(linears) for name, linears in header["sites"].items()},
        sites={name: {key: tensors[f"{name}/{key}"] for key in kinds[name]} for name in kinds},
        samples=samples,
    )
    try:
        _check_tensors(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; calibrate again") from None
    return content


def located(
    path: str | os.PathLike[str], revision: str | None, filename: str, token: str | bool | None
) -> str | os.PathLike[str]:
    """The file itself, downloaded if it is in a repository. What is here wins, as in diffusers."""
    here = Path(path, filename) if Path(path).is_dir() else Path(path)
    repository = split_repository(path)
    if Path(path).exists() and revision is not None:
        raise ValueError(f"revision={revision!r} is of a repository on the Hub, and {path} is here, on this disk")
    if here.is_file():
        return here
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder without {filename}; a statistics file is expected")
    if repository is None:
        raise FileNotFoundError(
            f"no statistics file at {path}; make one with dq.calibrate(...).save({str(path)!r}), or give a repository"
            ' on the Hub, "user/repo" or "user/repo@revision"'
        )
    repo_id, named = repository
    if named is not None and revision not in (None, named):
        raise ValueError(f"{path} names the revision {named!r}, and revision is {revision!r}: give one of them")
    try:
        return fetch(repo_id, filename, revision=revision or named, token=token)
    except (FileNotFoundError, PermissionError, ConnectionError) as error:
        raise type(error)(f"no statistics: there is no file {here} on this disk, and {error}") from error.__cause__


def _check_header(path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
    """Raises ValueError for what `write` cannot have written."""
    about, sites = header["about"], header["sites"]
    sound = isinstance(about, dict) and isinstance(sites, dict) and isinstance(header.get("samples", []), list)
    lists = list(sites.values()) if sound else []
    texts = all(isinstance(linears, list) and all(isinstance(name, str) for name in linears) for linears in lists)
    if not sound or not texts or type(header["format_version"]) is not int:
        raise ValueError(
            f"the header of {path} is damaged: about, sites or samples are of a wrong type; calibrate again"
        )
    for key, kind in (("model_class", str), ("dtype", str), ("seed", int), ("calls_done", int), ("descending", bool)):
        if key in about and type(about[key]) is not kind:
            raise ValueError(f"the header of {path} is damaged: {key} is {about[key]!r}, {kind.__name__} is expected")
    done, calls = about.get("calls_done", 0), about.get("calls")
    if done < 0 or (isinstance(calls, int) and done > calls):
        raise ValueError(f"the header of {path} is damaged: {done} calls are done of {calls!r}; calibrate again")


def _check_tensors(content: Content) -> None:
    """Raises ValueError where shapes or dtypes are not those named above."""
    steps = len(content.timesteps) if content.timesteps.ndim else 0
    _check_tensor("timesteps", content.timesteps, torch.float32, (steps,))
    _check_tensor("fingerprint", content.fingerprint, torch.float32, (content.fingerprint.numel(),))
    if not steps or not torch.isfinite(content.timesteps).all():
        raise ValueError(f"its {steps} timesteps are not one number or more")
    rises = content.timesteps.diff() > 0
    if not (rises.all() or not rises.any() and (content.timesteps.diff() < 0).all()):
        raise ValueError("its timesteps neither fall nor rise from each to the next")
    for name, site in content.sites.items():
        channels, kept = (site[key].shape[-1] if site[key].ndim else 0 for key in ("min", "keys"))
        for key, tensor in site.items():
            shape, dtype = {
                "min": ((steps, channels), torch.float32),
                "max": ((steps, channels), torch.float32),
                "tokens": ((steps, kept, channels), torch.bfloat16),
                "keys": ((steps, kept), torch.float32),
                "sums": ((steps, channels), torch.float32),
                "counts": ((steps,), torch.int64),
                "products": ((channels, channels), torch.float32),
            }[key]
            _check_tensor(f"{name}/{key}", tensor, dtype, shape)


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, {dtype} {shape} is expected")
