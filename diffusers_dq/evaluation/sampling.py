# SPDX-License-Identifier: Apache-2.0
"""Thousands of pictures from a pipeline, the very same ones however many processes share the work.

Picture i has the generator of seed + i and the condition of index i. Batches are fixed, pictures kB to (k + 1)B - 1,
so that every matrix product has the same shape in any run; process p of P makes batches p, p + P, ... A batch is one
file, whole or absent: what is there is not made again.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_dq.denoise import cuda_devices, quiet
from diffusers_dq.evaluation.pictures import SETTINGS, PictureSet, Pixels, batch_file, by
from diffusers_dq.files import read_json, write_json, write_whole

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What to sample. Picture i gets class `classes[i % len]` or prompt `prompts[i % len]`; a pipeline without
    conditions gets neither.

    images: how many.   steps: denoising steps.   batch: pictures a call.   seed: of picture 0.
    guidance: guidance_scale; None is the pipeline's own.   arguments: further keyword arguments of every call.
    Raises ValueError for sizes below 1 or for classes and prompts together.
    """

    images: int
    steps: int
    batch: int = 32
    seed: int = 0
    guidance: float | None = None
    classes: Sequence[int] = ()
    prompts: Sequence[str] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("images", "steps", "batch"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.classes and self.prompts:
            raise ValueError("a picture has a class or a prompt; give classes or prompts, not both")

    def call(self, first: int, last: int) -> dict[str, Any]:
        """Keyword arguments of `pipe(...)` for pictures first to last - 1."""
        call: dict[str, Any] = dict(self.arguments)
        if self.guidance is not None:
            call["guidance_scale"] = self.guidance
        for name, values in (("class_labels", self.classes), ("prompt", self.prompts)):
            if values:
                call[name] = [values[i % len(values)] for i in range(first, last)]
        if not self.classes and not self.prompts and "prompt_embeds" not in self.arguments:
            call["batch_size"] = last - first
        return call

    def prompt(self, i: int) -> str:
        return self.prompts[i % len(self.prompts)]


def sample(
    pipe: DiffusionPipeline,
    sampling: Sampling,
    folder: str | Path,
    *,
    state: PartialState | None = None,
    size: tuple[int, int] | None = None,
    progress: bool = True,
) -> PictureSet:
    """Write the pictures to `folder`, or what is missing of them, and return the set.

    size: height and width that are expected; the first pictures of another size are an error.
    state: shares the batches among the processes of `accelerate launch`; the folder must be one that all of them see.
        Pictures are equal bit for bit on one kind of device and one number of threads, for any number of processes.
    A scheduler that draws noise at every step takes it from the pictures' generators where the pipeline passes them
    on; where it does not (DiTPipeline), from the global generator, which is seeded for each batch and put back.

    Raises ValueError for a folder with pictures of other settings or of another model, for a pipeline that makes
    videos (only pictures are evaluated), TypeError for arguments that the pipeline does not take.
    """
    folder = Path(folder)
    starts = range(0, sampling.images, sampling.batch)
    _check_call(pipe, sampling)
    settings = _settings(pipe, sampling)
    _claim(folder, settings)
    index, processes = (state.process_index, state.num_processes) if state else (0, 1)
    missing = [first for first in starts[index::processes] if not batch_file(folder, first).exists()]

    bar = tqdm(
        total=sum(_last(sampling, first) - first for first in missing),
        desc="sample",
        unit="picture",
        disable=not progress or index > 0,
    )
    with bar, quiet(pipe), torch.no_grad():
        for first in missing:
            last = _last(sampling, first)
            pixels = _pictures(pipe, sampling, first, last)
            if size is not None and pixels.shape[1:3] != size:
                raise ValueError(
                    f"the pictures are of {by(pixels.shape[1:3])} pixels, those of the reference of {by(size)}; both"
                    " must be of one size"
                )
            write_whole(batch_file(folder, first), partial(_save, pixels))
            bar.update(last - first)
    if state:
        state.wait_for_everyone()
    return PictureSet.open(folder)


def _save(pixels: Pixels, file: IO[bytes]) -> None:
    np.savez(file, pixels)


def _last(sampling: Sampling, first: int) -> int:
    return min(first + sampling.batch, sampling.images)


def _pictures(pipe: DiffusionPipeline, sampling: Sampling, first: int, last: int) -> Pixels:
    """uint8 [b, H, W, 3] of pictures first to last - 1."""
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(first, last)]
    with torch.random.fork_rng(devices=cuda_devices(pipe)):
        torch.manual_seed(sampling.seed + first)
        output = pipe(
            **sampling.call(first, last),
            generator=generators,
            num_inference_steps=sampling.steps,
            output_type="np",
            return_dict=False,
        )[0]
    images = np.asarray(output)
    if images.ndim != 4 or len(images) != last - first or images.shape[-1] != 3:
        raise ValueError(
            f"{type(pipe).__name__} made an output of shape {list(images.shape)} from {last - first} conditions; only"
            " pictures [n, H, W, 3] can be evaluated, no videos"
        )
    if not np.isfinite(images).all():
        raise ValueError(f"pictures {first} to {last - 1} are not finite: the model has diverged")
    return (images * 255).round().astype(np.uint8)


def _check_call(pipe: DiffusionPipeline, sampling: Sampling) -> None:
    signature = inspect.signature(pipe.__call__)
    known = signature.parameters
    if "class_labels" in known and not sampling.classes:
        raise ValueError(
            f"{type(pipe).__name__} is told a class: give --classes, the number of classes it was trained on"
        )
    if "prompt" in known and not sampling.prompts and "prompt_embeds" not in sampling.arguments:
        raise ValueError(f"{type(pipe).__name__} is told a prompt: give --prompts, a file with one a line")
    call = sampling.call(0, 1)
    for name in ("class_labels", "prompt"):
        if name in call and name not in known:
            raise ValueError(f"{type(pipe).__name__} takes no {name}; it takes {', '.join(known)}")
    try:
        signature.bind(**call, generator=[], num_inference_steps=1, output_type="np", return_dict=False)
    except TypeError as error:
        raise TypeError(f"{type(pipe).__name__} cannot be called so: {error}. It takes: {', '.join(known)}") from None


def _settings(pipe: DiffusionPipeline, sampling: Sampling) -> dict[str, Any]:
    """All that decides the pictures, JSON-able."""
    conditions = {"classes": list(sampling.classes), "prompts": _digest(list(sampling.prompts))}
    return {
        "format_version": FORMAT_VERSION,
        **{name: getattr(sampling, name) for name in ("images", "steps", "batch", "seed", "guidance")},
        **(conditions if sampling.prompts else {"classes": conditions["classes"]}),
        "arguments": json.loads(json.dumps(dict(sampling.arguments), default=_argument)),
        "pipeline": type(pipe).__name__,
        "scheduler": [type(pipe.scheduler).__name__, _digest(_configuration(pipe.scheduler))],
        "device": pipe.device.type,
        "model": fingerprint(pipe),
    }


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or raise ValueError where other ones are there. Processes that race write the same."""
    path = folder / SETTINGS
    if not path.exists():
        if folder.is_file() or (folder.is_dir() and any(folder.glob("pictures-*.npz"))):
            raise ValueError(f"{folder} holds something without {SETTINGS}; sample into an empty folder")
        write_json(path, settings)
        return
    try:
        earlier = dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no settings ({error}); sample into another folder") from None
    keys = sorted(earlier.keys() | settings.keys())
    other = [f"{key} {_short(earlier.get(key))}, now {_short(settings.get(key))}" for key in keys
             if earlier.get(key) != settings.get(key)]  # fmt: skip
    if other:
        raise ValueError(
            f"{folder} holds pictures of other settings: {'; '.join(other)}. Give the same, or another folder"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def fingerprint(pipe: DiffusionPipeline) -> str:
    """16 hex digits of the weights and dtypes of all of a pipeline's networks and of their configurations.

    Reads all weights once: seconds for some billions of them.
    """
    digest = hashlib.sha256()
    for name, module in sorted(pipe.components.items()):
        if isinstance(module, nn.Module):
            digest.update(f"{name} {type(module).__name__} {_digest(_configuration(module))}".encode())
            _add_weights(digest, module)
    return digest.hexdigest()[:16]


def module_fingerprint(module: nn.Module) -> str:
    """16 hex digits of a module's class and weights."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    _add_weights(digest, module)
    return digest.hexdigest()[:16]


def _add_weights(digest: Any, module: nn.Module) -> None:
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _configuration(part: Any) -> dict[str, Any]:
    """Of a network or scheduler; {} where it has none. Without what diffusers keeps for itself: where it was loaded
    from, and the names left at their defaults, whose order changes from process to process."""
    config = getattr(part, "config", None)
    content = dict(config) if isinstance(config, Mapping) else {}
    quantization = content.get("quantization_config")
    if quantization is not None and hasattr(quantization, "to_dict"):
        content["quantization_config"] = quantization.to_dict()
    return {key: value for key, value in content.items() if not key.startswith("_")}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _argument(value: Any) -> str:
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().cpu().double().contiguous().numpy().tobytes()).hexdigest()[:16]
    return str(value)
