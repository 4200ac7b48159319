# SPDX-License-Identifier: Apache-2.0
"""`diffusers-dq evaluate ...`"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_dq.evaluation.features import INCEPTION, Extractor
from diffusers_dq.evaluation.figures import NAMES, Figures, Judges, check_reference, measure
from diffusers_dq.evaluation.files import write_json
from diffusers_dq.evaluation.loading import DTYPES, class_labels, load_pipeline, read_prompts
from diffusers_dq.evaluation.paired import compare
from diffusers_dq.evaluation.perception import Clip, load_lpips
from diffusers_dq.evaluation.pictures import PICTURES, PictureSet, sampled_folder
from diffusers_dq.evaluation.provenance import provenance
from diffusers_dq.evaluation.sampling import Sampling, sample


def evaluate(
    model: Annotated[str, typer.Argument(help="folder or Hub name of a pipeline, quantized or not")],
    output: Annotated[Path, typer.Option(help="folder for the pictures and metrics.json; a later run goes on there")],
    images: Annotated[int, typer.Option(help="pictures; papers take 10,000 to 50,000")] = 10_000,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 50,
    batch: Annotated[int, typer.Option(help="pictures a call")] = 32,
    seed: Annotated[int, typer.Option(help="of the first picture; picture i has seed + i")] = 0,
    guidance: Annotated[float | None, typer.Option(help="guidance scale; by default the pipeline's")] = None,
    classes: Annotated[
        int | None, typer.Option(help="picture i is of class i modulo this; by default the pipeline's own labels")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="text file, a prompt a line, taken in turn")] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="set for FID and its kin: a folder of pictures, an .npz of ADM's form, a sampled set"),
    ] = None,
    paired_with: Annotated[
        str | None, typer.Option(help="for PSNR and its kin: a sampled set, or a model to sample with the same seeds")
    ] = None,
    pairs: Annotated[
        int, typer.Option(help="also run dq.compare on so many pictures; needs a model to pair with")
    ] = 0,
    features: Annotated[
        str, typer.Option(help="inception, or path/to/file.py:function or module:function that returns a network")
    ] = "",
    clip: Annotated[str, typer.Option(help="folder or Hub name of a CLIP model, for the CLIP score")] = "",
    lpips: Annotated[str, typer.Option(help="alex, or path/to/file.py:function that returns a network")] = "",
    dtype: Annotated[str, typer.Option(help=f"of what is not quantized: {', '.join(DTYPES)}")] = "float32",
    device: Annotated[str, typer.Option(help="by default a GPU where there is one")] = "",
    argument: Annotated[
        list[str] | None, typer.Option(help="of the pipeline's call, as height=512; may repeat")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="metrics.json on stdout too, and nothing else")] = False,
) -> None:
    """Samples pictures from a model and measures them: FID, sFID, Inception Score, precision, recall, KID against a
    reference set; PSNR, SSIM, LPIPS against another model with the same seeds; CLIP score of prompts.

    Under `accelerate launch` (on CPUs: torchrun) the processes share the pictures, which are the very same ones. An
    interrupted run goes on where it stopped. Pictures only, no videos.
    """
    with told():
        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        place = _device(device, state)
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
            classes=class_labels(pipe, classes) if prompts is None else (),
            prompts=read_prompts(prompts) if prompts is not None else (),
            arguments=_arguments(argument or ()),
        )
        size = real.size if real is not None else None
        twin_pipe = load_pipeline(paired_with, dtype, place) if paired_with and twin_is_model else None
        pictures = sample(pipe, sampling, output / PICTURES, state=state, size=size)
        twin = PictureSet.open(paired_with) if paired_with and not twin_is_model else None
        if twin_pipe is not None:
            twin = sample(twin_pipe, sampling, output / "paired_with", state=state, size=size)
        if not state.is_main_process:
            return
        figures = measure(pictures, judges, reference=real, twin=twin, prompts=sampling.prompts, warn=_warn)
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
        if as_json:
            typer.echo((output / "metrics.json").read_text(encoding="utf-8").rstrip())
            return
        typer.echo(_table(figures, content))
        typer.echo(f"written: {output / 'metrics.json'}")


def _device(device: str, state: PartialState) -> str:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch {torch.__version__} sees no GPU here; give --device cpu")
    try:
        return str(torch.device(device)) if device else str(state.device)
    except RuntimeError:
        raise ValueError(f"--device must be a device of torch, as cpu or cuda:1, got {device!r}") from None


def _judges(features: str, clip: str, lpips: str, device: str, batch: int, *, wanted: bool) -> Judges:
    entry = features or (INCEPTION if wanted else "")
    return Judges(
        extractor=Extractor.load(entry) if entry else None,
        clip=Clip.load(clip, device) if clip else None,
        lpips=load_lpips(lpips) if lpips else None,
        device=device,
        batch=max(batch, 1),
    )


def _check_pairs(paired_with: str | None, pairs: int) -> bool:
    """Whether `paired_with` is a model, and not a set."""
    is_set = paired_with is not None and sampled_folder(Path(paired_with)) is not None
    if pairs < 0:
        raise ValueError(f"--pairs must be at least 0, got {pairs}")
    if pairs and (paired_with is None or is_set):
        raise ValueError("--pairs runs two models side by side; give --paired-with a model")
    return paired_with is not None and not is_set


def _arguments(given: Sequence[str]) -> dict[str, Any]:
    """name=value; a value that is no JSON is a string."""
    arguments = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--argument must be name=value, as height=512; got {text!r}")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


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


def _warn(message: str) -> None:
    typer.echo(f"warning: {message}", err=True)


@contextmanager
def told() -> Iterator[None]:
    """A mistake in what was given is a message, not a traceback."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        logging.getLogger(__name__).debug("the traceback", exc_info=True)
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
