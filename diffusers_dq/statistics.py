# SPDX-License-Identifier: Apache-2.0
"""What calibration saw: one artefact that serves every method, kept in one safetensors file.

Notation: S calibrated steps in the order the pipeline visited them, K channels, R sampled tokens.
"""

import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from torch import Tensor, nn

from diffusers_dq.files import check_writable, read_tensors, workplace, write_tensors
from diffusers_dq.model_inputs import ModelInput, pack, unpack
from diffusers_dq.repository import fetch, open_repository, send, split_repository

FORMAT_VERSION = 1
FILENAME = "statistics.safetensors"  # in a repository on the Hub
_FINGERPRINT_TENSORS = 256
_SITE_TENSORS = ("min", "max", "tokens", "keys")
_MOMENTS = ("sums", "counts", "products")
_SHARED_BY_PARTS = ("model_class", "pipeline_class", "scheduler", "num_inference_steps", "dtype", "second_moments")


@dataclass(frozen=True, repr=False)
class SiteStatistics:
    """One activation over the steps.

    minimum, maximum: [S, K] fp32, over all tokens of all calls.   tokens: [S, R, K] bf16, a uniform sample.
    keys: [S, R] fp32, the sample's random priorities (to go on sampling).   linears: who reads it.
    sums: [S, K] fp32, counts: [S] int64, products: [K, K] fp32: sum x and number of the tokens of each step, and
        sum x x^T over all of them; None unless calibrated with second_moments=True.
    """

    linears: tuple[str, ...]
    minimum: Tensor
    maximum: Tensor
    tokens: Tensor
    keys: Tensor
    sums: Tensor | None = None
    counts: Tensor | None = None
    products: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        always = {"min": self.minimum, "max": self.maximum, "tokens": self.tokens, "keys": self.keys}
        if self.sums is None or self.counts is None or self.products is None:
            return always
        return always | {"sums": self.sums, "counts": self.counts, "products": self.products}

    def at(self, steps: Tensor) -> "SiteStatistics":
        """Of some of the steps, [S] bool or indices. The products stay those of all: they are not kept by step."""
        return replace(
            self,
            minimum=self.minimum[steps],
            maximum=self.maximum[steps],
            tokens=self.tokens[steps],
            keys=self.keys[steps],
            sums=None if self.sums is None else self.sums[steps],
            counts=None if self.counts is None else self.counts[steps],
        )

    @classmethod
    def merged(cls, parts: Sequence["SiteStatistics"]) -> "SiteStatistics":
        """Of the tokens of all parts: R is the least of the parts', for the smallest R keys of each are known to hold
        the smallest R of all, a uniform sample. Raises ValueError where other linears read the activation.
        """
        first = parts[0]
        for part in parts[1:]:
            if (part.linears, part.minimum.shape) != (first.linears, first.minimum.shape):
                raise ValueError(
                    f"one activation cannot have been read by {first.linears} with minima {tuple(first.minimum.shape)}"
                    f" and by {part.linears} with minima {tuple(part.minimum.shape)}"
                )
        kept = min(part.keys.shape[1] for part in parts)
        keys = torch.cat([part.keys for part in parts], dim=1)  # [S, sum R], 1 in steps that a part did not visit
        keys, order = keys.sort(dim=1, stable=True)
        tokens = torch.cat([part.tokens for part in parts], dim=1)  # [S, sum R, K]
        tokens = tokens.gather(1, order[:, :kept, None].expand(-1, -1, tokens.shape[2]))
        merged = replace(
            first,
            minimum=torch.stack([part.minimum for part in parts]).amin(dim=0),
            maximum=torch.stack([part.maximum for part in parts]).amax(dim=0),
            tokens=tokens,
            keys=keys[:, :kept].contiguous(),
        )
        if first.products is None:
            return merged
        added = {name: sum(getattr(part, name) for part in parts) for name in _MOMENTS}
        return replace(merged, **added)

    def filled(self) -> "SiteStatistics":
        """With the nearest visited step's in place of a step in which the site was not reached."""
        seen = self.visited.nonzero().flatten()
        nearest = seen[(torch.arange(len(self.minimum))[:, None] - seen).abs().argmin(dim=1)]
        return self.at(nearest)

    @property
    def visited(self) -> Tensor:
        """[S] bool: the steps in which the site was reached."""
        return torch.isfinite(self.minimum).all(dim=1) & torch.isfinite(self.maximum).all(dim=1)


@dataclass(frozen=True, repr=False)
class Statistics:
    """Activation statistics of one transformer, keyed by timestep value.

    timesteps: [S] fp32 in the model's own units, in the order of denoising (noisiest first).
    sites: by name; a LinearGroup's is its first linear, an attention operand's is `<linear>:output`.
    fingerprint: a sample of the weights, by which the checkpoint is known again.
    about: JSON-able facts: model class, seed, number of steps and calls, scheduler, versions.
    samples: whole inputs of some forwards, evenly spread over the steps (model_inputs.py).
    """

    timesteps: Tensor
    sites: Mapping[str, SiteStatistics]
    fingerprint: Tensor
    about: Mapping[str, Any] = field(default_factory=dict)
    samples: tuple[ModelInput, ...] = ()

    def __repr__(self) -> str:
        about = f"{self.about.get('model_class')}, {len(self.timesteps)} timesteps, {len(self.sites)} sites"
        return f"Statistics({about}, {self.about.get('calls_done', 0)} calls)"

    def at(self, steps: Tensor) -> "Statistics":
        """As if only some of the steps had been calibrated, [S] bool. Raises ValueError for none."""
        if not steps.any():
            raise ValueError(f"none of the {len(self.timesteps)} calibrated steps was chosen")
        if steps.all():
            return self  # not a copy: its file may be mapped, not read
        return replace(
            self, timesteps=self.timesteps[steps], sites={name: site.at(steps) for name, site in self.sites.items()}
        )

    @classmethod
    def merge(cls, parts: Sequence["Statistics"]) -> "Statistics":
        """As if one calibration had made the calls of all parts: of processes that calibrated a share of them each.

        The result does not depend on the order of `parts`. Extremes, sums and counts are those of all tokens; each
        site keeps a sample of all tokens, and the whole inputs that the parts kept are kept together.

        Raises ValueError for no parts, and for parts of other weights, schedules or settings, or that drew the same
        random numbers: call i of a part is seeded `seed + i`, so a part that begins with call n takes `seed + n`. Also
        where parts discovered other groups of linears, for some of their linears were reached in one part only.
        """
        if not parts:
            raise ValueError("there are no statistics to merge; expected those of each process")
        parts = sorted(parts, key=lambda part: int(part.about["seed"]))
        first = parts[0]
        for part in parts[1:]:
            first._check_mergeable(part)
        for part, following in zip(parts, parts[1:], strict=False):
            end = int(part.about["seed"]) + int(part.about["calls_done"])
            if end > int(following.about["seed"]):
                raise ValueError(
                    f"parts with the seeds {part.about['seed']} and {following.about['seed']} drew the same noise, for"
                    f" the first has {part.about['calls_done']} calls; calibrate a share that begins with call n with"
                    " seed + n"
                )
        _check_groups(parts)
        names = dict.fromkeys(name for part in parts for name in part.sites)
        about = dict(first.about)
        for key in ("calls", "calls_done", "samples"):
            about[key] = sum(part.about.get(key, 0) for part in parts)
        about["arguments"] = [argument for part in parts for argument in part.about.get("arguments", ())]
        return replace(
            first,
            sites={name: SiteStatistics.merged([p.sites[name] for p in parts if name in p.sites]) for name in names},
            about=about,
            samples=tuple(sample for part in parts for sample in part.samples),
        )

    def _check_mergeable(self, other: "Statistics") -> None:
        if not torch.equal(self.fingerprint, other.fingerprint):
            raise ValueError(
                "statistics of models with different weights cannot be merged; calibrate the same checkpoint in the"
                " same dtype in every process"
            )
        for key in _SHARED_BY_PARTS:
            if self.about.get(key) != other.about.get(key):
                raise ValueError(
                    f"statistics with another {key} cannot be merged: {self.about.get(key)!r} and"
                    f" {other.about.get(key)!r}"
                )
        if not torch.equal(self.timesteps, other.timesteps):
            raise ValueError(
                f"statistics of other timesteps cannot be merged: {self.timesteps.tolist()} and"
                f" {other.timesteps.tolist()}; calibrate the same steps, and sizes of pictures, in every process"
            )

    @property
    def descending(self) -> bool:
        """Whether the timestep value falls while denoising, as in most models (Lumina and Z-Image rise). One step does
        not show it: then as the model's spec said when it was calibrated."""
        if len(self.timesteps) < 2:
            return bool(self.about.get("descending", True))
        return bool(self.timesteps[0] > self.timesteps[-1])

    def input_of(self, linear: str) -> SiteStatistics | None:
        """The site that a linear reads; None where it was never reached."""
        return next((site for site in self.sites.values() if linear in site.linears), None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; an existing one is replaced only once the new one is whole on disk."""
        tensors = {"timesteps": self.timesteps, "fingerprint": self.fingerprint}
        for name, site in self.sites.items():
            tensors |= {f"{name}/{key}": value for key, value in site.tensors().items()}
        structures, of_samples = pack(self.samples)
        tensors |= of_samples
        header = {
            "format_version": FORMAT_VERSION,
            "samples": structures,
            "about": dict(self.about),
            "sites": {name: list(site.linears) for name, site in self.sites.items()},
        }
        write_tensors(check_writable(path), tensors, header)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str = FILENAME,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload calibration statistics",
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload as one file of a repository, which is made if it is not there; `Statistics.load(repo_id)` reads it.

        The file names the arguments of the calibrated calls, prompts among them. Raises as `dq.push_to_hub` does.
        """
        api = HfApi(token=token)
        with workplace(Path(tempfile.gettempdir(), "diffusers_dq-push")) as folder:
            self.save(Path(folder, FILENAME))
            repo_id, parent = open_repository(api, repo_id, private=private, revision=revision)
            return send(
                api,
                repo_id,
                {filename: Path(folder, FILENAME)},
                message=commit_message,
                revision=revision,
                parent=parent,
                create_pr=create_pr,
            )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        filename: str = FILENAME,
        token: str | bool | None = None,
    ) -> "Statistics":
        """From a file or, where there is none, from a repository on the Hub, "user/repo" or "user/repo@revision".

        filename: in the repository, or in a folder.   revision, token: of the repository.
        Raises FileNotFoundError, ValueError where the file is not a whole, known statistics file, and of a repository
        PermissionError for one that is gated and ConnectionError without a network.
        """
        path = _located(path, revision, filename, token)
        try:
            header, tensors = read_tensors(path)
        except ValueError as error:
            raise ValueError(f"{error}; calibrate again") from error
        if not isinstance(header, dict) or not {"format_version", "about", "sites"} <= header.keys():
            raise ValueError(
                f"{path} is a safetensors file, but not one of statistics; expected one from dq.calibrate"
            )
        if header["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"{path} has statistics format {header['format_version']}, this diffusers_dq reads up to"
                f" {FORMAT_VERSION}: upgrade diffusers_dq"
            )
        return cls._from_parts(path, header, tensors)

    @classmethod
    def _from_parts(
        cls, path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]
    ) -> "Statistics":
        _check_header(path, header)
        moments = _MOMENTS if header["about"].get("second_moments") else ()
        kinds = {name: _SITE_TENSORS + (moments if linears else ()) for name, linears in header["sites"].items()}
        expected = {"timesteps", "fingerprint"} | {f"{name}/{key}" for name in kinds for key in kinds[name]}
        try:
            samples = unpack(header.get("samples", []), tensors)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} does not hold the samples its header names ({error!r}); calibrate again"
            ) from None
        of_sites = {key for key in tensors if not key.startswith("samples/")}
        if expected != of_sites:
            odd = sorted(expected ^ of_sites)
            raise ValueError(f"{path} does not hold the tensors its header names; missing or extra: {odd[:5]}")
        sites = {
            name: SiteStatistics(tuple(linears), *(tensors[f"{name}/{key}"] for key in kinds[name]))
            for name, linears in header["sites"].items()
        }
        statistics = cls(tensors["timesteps"], sites, tensors["fingerprint"], header["about"], samples)
        try:
            _check_tensors(statistics)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; calibrate again") from None
        return statistics

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-able, by which a later run knows that it works on the same statistics."""
        about = {key: value for key, value in self.about.items() if key != "versions"}
        return about | {"fingerprint": f"{zlib.crc32(self.fingerprint.numpy().tobytes()):08x}"}

    def dtypes_for(self, model: nn.Module) -> dict[torch.dtype, torch.dtype]:
        """What of the samples has to be cast for a model in another precision than the one calibrated."""
        taken = getattr(torch, str(self.about.get("dtype", "")).removeprefix("torch."), torch.float32)
        return {taken: next(p.dtype for p in model.parameters() if p.is_floating_point())}

    def check_finite(self) -> None:
        """Raises ValueError that names the first step, and in it the first site, whose extremes are not numbers; or a
        site whose sampled tokens are none."""
        first = len(self.timesteps), ""
        for name, site in self.sites.items():
            unvisited = torch.isposinf(site.minimum) & torch.isneginf(site.maximum)
            finite = torch.isfinite(site.minimum) & torch.isfinite(site.maximum)
            bad = (~(finite | unvisited)).any(dim=1).nonzero().flatten().tolist()
            if bad and bad[0] < first[0]:
                first = bad[0], name
        step, name = first
        if name:
            raise not_finite(name, step, float(self.timesteps[step]))
        for name, site in self.sites.items():
            if site.tokens.numel() and not all(map(torch.isfinite, site.tokens.aminmax())):  # NaN is both
                raise ValueError(f"the tokens sampled of {name} hold NaN or infinite values: calibrate again")

    def check_model(self, model: nn.Module) -> None:
        """Raises ValueError unless the statistics were taken on this architecture with these weights."""
        known = self.about.get("model_class")
        if known != type(model).__name__:
            raise ValueError(f"the statistics are of a {known}, the model is a {type(model).__name__}: calibrate it")
        fingerprint = fingerprint_of(model)
        matrices = sum(p.ndim >= 2 and p.is_floating_point() for p in model.parameters())
        if len(self.fingerprint) == 4 * -(-matrices // max(1, -(-matrices // _FINGERPRINT_TENSORS))):
            fingerprint = fingerprint[: len(self.fingerprint)]  # as earlier versions took it, of matrices only
        if fingerprint.shape != self.fingerprint.shape:
            raise ValueError(
                f"the statistics are of a {known} of another size ({len(self.fingerprint)} fingerprint values, this"
                f" model has {len(fingerprint)}): calibrate this model"
            )
        # bf16 keeps 8 bits: two roundings of one weight differ by at most 2^-8 of it.
        if not torch.allclose(fingerprint, self.fingerprint, rtol=2**-7, atol=1e-6):
            raise ValueError(
                f"the statistics were taken on a {known} with other weights than this one's: calibrate this"
                " checkpoint, or load the one the statistics belong to"
            )
        modules = dict(model.named_modules())
        for name, site in self.sites.items():
            for linear in site.linears:
                width = getattr(modules.get(linear), "in_features", site.minimum.shape[1])
                if width != site.minimum.shape[1]:
                    raise ValueError(
                        f"the statistics of {name} are of {site.minimum.shape[1]} channels, {linear} reads {width}:"
                        " calibrate this model"
                    )


def _check_groups(parts: Sequence[Statistics]) -> None:
    """Raises ValueError where parts disagree on who shares a linear's input: groups of an architecture without a spec
    are discovered from what calls reach, and named after the first linear that they reach."""
    groups: dict[str, tuple[str, ...]] = {}
    for part in parts:
        for site in part.sites.values():
            for linear in site.linears:
                known = groups.setdefault(linear, site.linears)
                if known != site.linears:
                    raise ValueError(
                        f"{linear} shares its input with {known} in one part and with {site.linears} in another:"
                        f" {part.about.get('model_class')} has no spec, and not all parts reached the same linears."
                        " Give each process calls that reach all of them, or calibrate all calls in one process"
                    )


def _check_header(path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
    """Raises ValueError for what `save` cannot have written."""
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


def _check_tensors(statistics: Statistics) -> None:
    """Raises ValueError where shapes or dtypes are not those of the docstrings."""
    steps = len(statistics.timesteps) if statistics.timesteps.ndim else 0
    _check_tensor("timesteps", statistics.timesteps, torch.float32, (steps,))
    _check_tensor("fingerprint", statistics.fingerprint, torch.float32, (statistics.fingerprint.numel(),))
    if not steps or not torch.isfinite(statistics.timesteps).all():
        raise ValueError(f"its {steps} timesteps are not one number or more")
    rises = statistics.timesteps.diff() > 0
    if not (rises.all() or not rises.any() and (statistics.timesteps.diff() < 0).all()):
        raise ValueError("its timesteps neither fall nor rise from each to the next")
    for name, site in statistics.sites.items():
        channels, kept = (
            site.minimum.shape[-1] if site.minimum.ndim else 0,
            site.keys.shape[-1] if site.keys.ndim else 0,
        )
        for key, tensor in site.tensors().items():
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


def not_finite(site: str, step: int, timestep: float) -> ValueError:
    return ValueError(
        f"{site} received NaN or infinite values at step {step} (timestep {timestep:g}); statistics of it would be"
        " meaningless. Check the model's dtype (fp16 overflow?) and inputs"
    )


def _located(
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


def fingerprint_of(model: nn.Module) -> Tensor:
    """Four values each of up to 256 matrices spread over the model, then of up to 256 biases, tables of norms and the
    like, [2048 at most] fp32: the same in any float dtype up to its rounding."""
    floating = [p for _, p in sorted(model.named_parameters()) if p.is_floating_point() and p.numel()]
    matrices, vectors = [p for p in floating if p.ndim >= 2], [p for p in floating if p.ndim < 2]
    return torch.cat([_sampled(matrices), _sampled(vectors)])


def _sampled(parameters: Sequence[Tensor]) -> Tensor:
    stride = max(1, -(-len(parameters) // _FINGERPRINT_TENSORS))
    samples = []
    for parameter in parameters[::stride]:
        flat = parameter.detach().flatten()
        places = torch.linspace(0, flat.numel() - 1, 4, dtype=torch.float64).long()
        samples.append(flat[places.to(flat.device)].float().cpu())
    return torch.cat(samples) if samples else torch.empty(0)
