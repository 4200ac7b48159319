# SPDX-License-Identifier: Apache-2.0
"""All figures of a set of pictures: against a reference set, against a twin of the same seeds, and alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from diffusers_dq.evaluation.distribution import fid, inception_score, kid, precision_recall
from diffusers_dq.evaluation.features import Extractor, features_of
from diffusers_dq.evaluation.metrics import SSIM_WINDOW, Array, optional, psnr, ssim
from diffusers_dq.evaluation.perception import Clip, Distance, lpips
from diffusers_dq.evaluation.pictures import PictureSet, Pixels, by, check_one_size

NAMES = ("FID", "sFID", "IS", "precision", "recall", "KID", "PSNR", "SSIM", "LPIPS", "CLIP")
_NEIGHBOURS = 3  # k of precision and recall
_DECIMALS = {"FID": 2, "sFID": 2, "IS": 2, "PSNR": 2, "CLIP": 2, "KID": 5}
_SAME_SEEDS = ("images", "steps", "seed", "guidance", "classes", "prompts", "arguments", "pipeline", "scheduler")


@dataclass
class Figures:
    """values: name -> figure.   missing: name -> why there is none. Every name of NAMES is in one of the two.
    notes: what a reader of the figures has to know."""

    values: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def text(self, name: str) -> str:
        """For a table's cell."""
        if name not in self.values:
            return "-"
        value = self.values[name]
        return f"{value:.{_DECIMALS.get(name, 4)}f}" if math.isfinite(value) else str(value)

    def to_dict(self) -> dict[str, Any]:
        return {"figures": self.values, "not_available": self.missing, "notes": self.notes}


@dataclass(frozen=True, kw_only=True)
class Judges:
    """What the figures are computed with; without one, its figures are missing, with the reason that is given."""

    extractor: Extractor | None = None
    clip: Clip | None = None
    lpips: Distance | None = None
    why_no_features: str = "no feature extractor: give --features"
    why_no_lpips: str = "no network: give --lpips"
    device: str | torch.device = "cpu"
    batch: int = 64


def measure(
    pictures: PictureSet,
    judges: Judges,
    *,
    reference: PictureSet | None = None,
    twin: PictureSet | None = None,
    prompts: Sequence[str] = (),
    progress: bool = True,
    warn: Callable[[str], None] = lambda message: None,
) -> Figures:
    """reference: real pictures, or those of full precision, for FID and its kin.   twin: of the same seeds, for PSNR
    and its kin.   prompts: of the pictures, repeated in turn.

    Raises ValueError for sets of other sizes, or less than 2 pictures where a distribution is asked for, before
    anything is computed.
    """
    check_sets(pictures, reference, twin)
    figures = Figures()
    _against_reference(figures, pictures, reference, judges, progress, warn)
    _against_twin(figures, pictures, twin, judges)
    _with_prompts(figures, pictures, judges, prompts)
    figures.values = {name: figures.values[name] for name in NAMES if name in figures.values}
    return figures


def check_sets(pictures: PictureSet, reference: PictureSet | None, twin: PictureSet | None) -> None:
    """Raises ValueError where sets cannot be compared."""
    if reference is not None:
        check_reference(reference)
        check_one_size(pictures, reference)
    if twin is not None:
        check_one_size(pictures, twin)
        _check_twins(pictures, twin)


def check_reference(reference: PictureSet) -> None:
    if len(reference) < 2:
        raise ValueError(f"{reference.place} holds 1 picture; a distribution needs 2 at least, FID some thousands")


def _check_twins(a: PictureSet, b: PictureSet) -> None:
    for pictures in (a, b):
        if not pictures.settings:
            raise ValueError(
                f"{pictures.place} was not sampled by diffusers-dq, so its seeds are not known; --paired-with takes a"
                " model or a folder that `diffusers-dq evaluate` wrote"
            )
    other = [key for key in _SAME_SEEDS if a.settings.get(key) != b.settings.get(key)]
    if other:
        facts = "; ".join(f"{key} {a.settings.get(key)} and {b.settings.get(key)}" for key in other)
        raise ValueError(f"{a.place} and {b.place} are no pairs: {facts}")


def _against_reference(
    figures: Figures,
    pictures: PictureSet,
    reference: PictureSet | None,
    judges: Judges,
    progress: bool,
    warn: Callable[[str], None],
) -> None:
    names = ("FID", "sFID", "IS", "precision", "recall", "KID")
    if judges.extractor is None:
        figures.missing |= dict.fromkeys(names, judges.why_no_features)
        return
    if len(pictures) < 2:
        figures.missing |= dict.fromkeys(names, "of 1 picture there is no distribution")
        return
    common: dict[str, Any] = dict(batch=judges.batch, device=judges.device, progress=progress, warn=warn)
    ours = features_of(pictures, judges.extractor, **common)
    _need(figures, ours, "logits", ("IS",), lambda logits: (inception_score(logits),))
    if reference is None:
        figures.missing |= {name: "no reference set: give --reference" for name in names if name != "IS"}
        return
    theirs = features_of(reference, judges.extractor, **common)
    _need(figures, ours, "spatial", ("sFID",), lambda x: (fid(x, theirs["spatial"]),))
    _need(figures, ours, "pooled", ("FID", "KID"), lambda x: (fid(x, theirs["pooled"]), kid(x, theirs["pooled"])))
    smaller = min(len(pictures), len(reference))
    if smaller > _NEIGHBOURS:
        _need(figures, ours, "pooled", ("precision", "recall"), lambda x: precision_recall(x, theirs["pooled"]))
    else:
        few = f"{smaller} pictures; the {_NEIGHBOURS} nearest others need {_NEIGHBOURS + 1} at least"
        figures.missing |= dict.fromkeys(("precision", "recall"), few)
    width = ours["pooled"].shape[1] if "pooled" in ours else 0
    if smaller <= width:
        figures.notes.append(
            f"{smaller} pictures give no full-rank covariance of {width} features: FID is far too high, compare only"
            " with FID of as many pictures"
        )


def _need(
    figures: Figures,
    features: dict[str, Any],
    part: str,
    names: tuple[str, ...],
    compute: Callable[[Any], tuple[float, ...]],
) -> None:
    if part not in features:
        figures.missing |= dict.fromkeys(names, f"the feature extractor gives no {part}")
        return
    figures.values |= zip(names, compute(features[part]), strict=True)


def _against_twin(figures: Figures, pictures: PictureSet, twin: PictureSet | None, judges: Judges) -> None:
    if twin is None:
        figures.missing |= dict.fromkeys(("PSNR", "SSIM", "LPIPS"), "no pairs: give --paired-with")
        return
    scorers: dict[str, Callable[[Pixels, Pixels], Array]] = {"PSNR": lambda a, b: psnr(_unit(a), _unit(b))}
    why_no_ssim = _why_no_ssim(pictures)
    if why_no_ssim:
        figures.missing["SSIM"] = why_no_ssim
    else:
        scorers["SSIM"] = lambda a, b: ssim(_unit(a), _unit(b))
    distance = judges.lpips
    if distance is None:
        figures.missing["LPIPS"] = judges.why_no_lpips
    else:
        scorers["LPIPS"] = lambda a, b: lpips(distance, a, b, judges.device)
    scores: dict[str, list[Array]] = {name: [] for name in scorers}
    for a, b in zip(twin.batches(judges.batch), pictures.batches(judges.batch), strict=True):
        for name, score in scorers.items():
            scores[name].append(score(a, b))
    figures.values |= {name: float(np.concatenate(parts).mean()) for name, parts in scores.items()}
    equal = int(np.isinf(np.concatenate(scores["PSNR"])).sum())
    if equal:
        figures.notes.append(f"{equal} of {len(pictures)} pairs are equal, their PSNR is infinite and so is the mean")


def _unit(pixels: Pixels) -> Array:
    return pixels / np.float32(255)


def _why_no_ssim(pictures: PictureSet) -> str:
    """Empty where it can be had."""
    if min(pictures.size) < SSIM_WINDOW:
        return f"its window is of {by((SSIM_WINDOW, SSIM_WINDOW))} pixels, the pictures are of {by(pictures.size)}"
    try:
        optional("torchmetrics.functional.image")
    except ImportError as error:
        return str(error)
    return ""


def _with_prompts(figures: Figures, pictures: PictureSet, judges: Judges, prompts: Sequence[str]) -> None:
    if judges.clip is None or not prompts:
        figures.missing["CLIP"] = "no CLIP model: give --clip" if prompts else "the pictures have no prompts"
        return
    scores, first = [], 0
    for pixels in pictures.batches(judges.batch):
        texts = [prompts[i % len(prompts)] for i in range(first, first + len(pixels))]
        scores.append(judges.clip.score(pixels, texts))
        first += len(pixels)
    figures.values["CLIP"] = float(np.concatenate(scores).mean())
