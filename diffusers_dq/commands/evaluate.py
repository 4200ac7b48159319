# SPDX-License-Identifier: Apache-2.0
"""`diffusers-dq evaluate ...`"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_dq.commands.console import device_of, emit, note
from diffusers_dq.commands.options import Argument, Device, Dtype, Guidance, Json, Model, Prompts, Steps, key_values
from diffusers_dq.evaluation.features import INCEPTION, Extractor
from diffusers_dq.evaluation.figures import NAMES, Figures, Judges, check_reference, measure
from diffusers_dq.evaluation.loading import class_labels, load_pipeline, read_prompts
from diffusers_dq.evaluation.paired import compare
from diffusers_dq.evaluation.perception import Clip, load_lpips
from diffusers_dq.evaluation.pictures import PICTURES, PictureSet, sampled_folder
from diffusers_dq.evaluation.provenance import provenance
from diffusers_dq.evaluation.sampling import Sampling, sample
from diffusers_dq.files import write_json


def evaluate(
    model: Model,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="pictures and metrics.json; a later run goes on there"),
    ],
    images: Annotated[int, typer.Option("--images", min=1, help="papers take 10,000 to 50,000")] = 10_000,
    steps: Steps = 50,
    batch: Annotated[int, typer.Option("--batch", min=1, help="pictures a call")] = 32,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the first picture; picture i has seed + i")] = 0,
    guidance: Guidance = None,
    classes: Annotated[
        int | None,
        typer.Option("--classes", help="picture i is of class i modulo this; by default the pipeline's own labels"),
    ] = None,
    prompts: Prompts = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            metavar="SET",
            help="for FID and its kin: a folder of pictures, an .npz of ADM's form, a sampled set",
        ),
    ] = None,
    paired_with: Annotated[
        str | None,
        typer.Option(
            "--paired-with",
            metavar="SET|MODEL",
            help="for PSNR and its kin: a sampled set, or a model to sample with the same seeds",
        ),
    ] = None,
    pairs: Annotated[
        int, typer.Option("--pairs", min=0, help="also run dq.compare on so many pictures; needs a model to pair with")
    ] = 0,
    features: Annotated[
        str,
        typer.Option(
            "--features",
            metavar="NETWORK",
            help="inception, or path/to/file.py:function or module:function that returns a network",
        ),
    ] = "",
    clip: Annotated[
        str, typer.Option("--clip", metavar="MODEL", help="folder or Hub name of a CLIP model, for the CLIP score")
    ] = "",
    lpips: Annotated[
        str,
        typer.Option("--lpips", metavar="NETWORK", help="alex, or path/to/file.py:function that returns a network"),
    ] = "",
    argument: Argument = None,
    device: Device = "",
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Sample pictures from a model and measure them: FID, sFID, Inception Score, precision, recall, KID against a
    reference set; PSNR, SSIM, LPIPS against another model with the same seeds; CLIP score of prompts.

    Under `accelerate launch` (on CPUs: torchrun) the processes share the pictures, which are the very same ones. An
    interrupted run goes on where it stopped. Pictures only, no videos.
    """
    arguments = key_values("--argument", argument)
    told = read_prompts(prompts) if prompts is not None else []
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    place = device_of(device) if device else str(state.device)
    judges = _judges(features, clip, lpips, place, batch, wanted=reference is not None)
    real = PictureSet.open(reference) if reference is not None else None
    if real is not None:
        check_reference(real)
    twin_is_model = _check_pairs(paired_with, pairs)
    pipe = load_pipeline(model, dtype, place)
    sampling = Sampling(
        images=images,
        steps=steps,
        batch=batch,
        seed=seed,
        guidance=guidance,
        classes=class_labels(pipe, classes) if not told else (),
        prompts=told,
        arguments=arguments,
    )
    size = real.size if real is not None else None
    twin_pipe = load_pipeline(paired_with, dtype, place) if paired_with and twin_is_model else None
    pictures = sample(pipe, sampling, output / PICTURES, state=state, size=size)
    twin = PictureSet.open(paired_with) if paired_with and not twin_is_model else None
    if twin_pipe is not None:
        twin = sample(twin_pipe, sampling, output / "paired_with", state=state, size=size)
    if not state.is_main_process:
        return
    figures = measure(pictures, judges, reference=real, twin=twin, prompts=told, warn=_warn)
    content: dict[str, Any] = {"model": model, **figures.to_dict(), "n": len(pictures)}
    if twin_pipe is not None and pairs:
        content["pairs"] = _compare(twin_pipe, pipe, sampling, min(pairs, images), output / "pairs")
    content |= {
        "seeds": [seed, seed + images - 1],
        "sampling": pictures.settings,
        "reference": None if real is None else {"place": str(reference), "n": len(real)},
        "paired_with": paired_with,
        "features": None if judges.extractor is None else [judges.extractor.name, judges.extractor.key],
        "clip": clip or None,
        "lpips": lpips or None,
        **provenance(place),
    }
    write_json(output / "metrics.json", content)
    emit(content, f"{_table(figures, content)}\nwritten: {output / 'metrics.json'}", as_json=json)


def _warn(message: str) -> None:
    note(f"warning: {message}")


def _judges(features: str, clip: str, lpips: str, device: str, batch: int, *, wanted: bool) -> Judges:
    entry = features or (INCEPTION if wanted else "")
    return Judges(
        extractor=Extractor.load(entry) if entry else None,
        clip=Clip.load(clip, device) if clip else None,
        lpips=load_lpips(lpips) if lpips else None,
        device=device,
        batch=batch,
    )


def _check_pairs(paired_with: str | None, pairs: int) -> bool:
    """Whether `paired_with` is a model, and not a set."""
    is_set = paired_with is not None and sampled_folder(Path(paired_with)) is not None
    if pairs and (paired_with is None or is_set):
        raise ValueError("--pairs runs two models side by side; give --paired-with a model")
    return paired_with is not None and not is_set


def _compare(
    reference: DiffusionPipeline, quantized: DiffusionPipeline, sampling: Sampling, pairs: int, folder: Path
) -> dict[str, Any]:
    """What dq.compare finds on the first pictures of the set; its files go to `folder`."""
    calls = [sampling.call(i, i + 1) for i in range(pairs)]
    found = compare(reference, quantized, calls, num_inference_steps=sampling.steps, seed=sampling.seed)
    found.save(folder)
    return {"n": pairs, "latent_snr_db": [float(value) for value in found.latent_snr], "folder": str(folder)}


def _table(figures: Figures, content: Mapping[str, Any]) -> str:
    lines = [f"{content['n']} pictures of {content['model']}, seeds {content['seeds'][0]} to {content['seeds'][1]}"]
    for name in NAMES:
        reason = f"not available: {figures.missing[name]}" if name in figures.missing else figures.text(name)
        lines.append(f"{name:<10} {reason}")
    if "pairs" in content:
        lines.append(f"latent SNR at the last step, {content['pairs']['n']} pictures: "
                     f"{content['pairs']['latent_snr_db'][-1]:.1f} dB")  # fmt: skip
    return "\n".join([*lines, *(f"note: {note}" for note in figures.notes)])
