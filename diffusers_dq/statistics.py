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

from diffusers_dq.files import workplace
from diffusers_dq.fingerprint import check_fingerprint
from diffusers_dq.model_inputs import ModelInput
from diffusers_dq.repository import open_repository, send
from diffusers_dq.statistics_file import FILENAME, MOMENTS, Content, located, read, write

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
        added = {name: sum(getattr(part, name) for part in parts) for name in MOMENTS}
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
        linears = {name: site.linears for name, site in self.sites.items()}
        tensors = {name: site.tensors() for name, site in self.sites.items()}
        write(path, Content(self.about, self.timesteps, self.fingerprint, linears, tensors, self.samples))

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
        content = read(located(path, revision, filename, token))
        sites = {
            name: SiteStatistics(linears, *content.sites[name].values()) for name, linears in content.linears.items()
        }
        return cls(content.timesteps, sites, content.fingerprint, content.about, content.samples)

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
        check_fingerprint(self.fingerprint, model, known)
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


def not_finite(site: str, step: int, timestep: float) -> ValueError:
    return ValueError(
        f"{site} received NaN or infinite values at step {step} (timestep {timestep:g}); statistics of it would be"
        " meaningless. Check the model's dtype (fp16 overflow?) and inputs"
    )
