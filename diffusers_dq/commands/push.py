# SPDX-License-Identifier: Apache-2.0
"""`diffusers-dq push ...`"""

from typing import Annotated, Any

import typer
from diffusers import DiffusionPipeline

import diffusers_dq as dq
from diffusers_dq.commands.console import device_of, emit, note
from diffusers_dq.commands.options import (
    Component,
    Conditions,
    Device,
    Dtype,
    Json,
    Model,
    Seed,
    StatisticsFile,
    Steps,
    calling,
)
from diffusers_dq.denoise import DENOISERS
from diffusers_dq.evaluation.loading import load_pipeline
from diffusers_dq.hub import check_push, original, push_to_hub
from diffusers_dq.statistics import Statistics


@calling
def push(
    model: Model,
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="repository on the Hub; made where it is not")],
    compare_with: Annotated[
        str,
        typer.Option("--compare-with", metavar="MODEL", help="in full precision: figures and pictures of the card"),
    ] = "",
    private: Annotated[bool | None, typer.Option("--private/--public", help="of a repository that is made")] = None,
    revision: Annotated[str | None, typer.Option("--revision", metavar="BRANCH", help="to upload to")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="propose it, as a pull request")] = False,
    statistics: StatisticsFile = None,
    statistics_2: Annotated[
        str | None,
        typer.Option("--statistics-2", metavar="FILE", help=f"of {DENOISERS[1]}, where a pipeline has two"),
    ] = None,
    upload_statistics: Annotated[
        bool,
        typer.Option(
            "--upload-statistics/--describe-statistics", help="their file, which holds the prompts, or a description"
        ),
    ] = True,
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="OWNER/NAME", help="the original, where it is not known")
    ] = None,
    license: Annotated[str | None, typer.Option("--license", help="of the original, where it is not known")] = None,
    *,
    conditions: Conditions,
    steps: Steps = 50,
    seed: Seed = 0,
    component: Component = None,
    device: Device = "",
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Upload a quantized pipeline with its model card to the Hub.

    With --compare-with both models run on the same seeds first, and the card shows how far apart they are, with the
    first call, prompts included, as its example. The token is the one of `hf auth login`, or of HF_TOKEN.
    """
    if len(repo_id.split("/")) != 2 or not all(repo_id.split("/")):
        raise typer.BadParameter(f"OWNER/NAME is a repository's, as me/dit-w4a8; got {repo_id!r}")
    place = device_of(device)
    pipe = load_pipeline(model, dtype, place)
    observed = _statistics(pipe, statistics, statistics_2)
    arguments = conditions.calls_of(pipe) if compare_with else []
    call = arguments[0] | {"num_inference_steps": steps} if arguments else None
    user = check_push(pipe, repo_id, statistics=observed, call=call, revision=revision)
    note(f"pushing to {repo_id} as {user}")
    comparison = None
    if compare_with:
        reference = load_pipeline(compare_with, dtype, place)
        comparison = dq.compare(reference, pipe, arguments, num_inference_steps=steps, seed=seed, component=component)
        base_model, license = _of_reference(pipe, reference, base_model, license)
    commit = push_to_hub(
        pipe,
        repo_id,
        comparison=comparison,
        statistics=observed,
        upload_statistics=upload_statistics,
        call=call,
        base_model=base_model,
        license=license,
        private=private,
        revision=revision,
        create_pr=create_pr,
    )
    url = commit.pr_url if create_pr else commit.commit_url
    content = {"model": model, "repo_id": repo_id, "revision": revision, "commit": commit.oid, "url": url}
    emit(content, f"pushed: {url}", as_json=json)


def _statistics(pipe: DiffusionPipeline, first: str | None, second: str | None) -> dict[str, Statistics]:
    """By the name of the denoiser. Raises typer.BadParameter for a second of a pipeline that has one."""
    given = {name: source for name, source in zip(DENOISERS, (first, second), strict=False) if source is not None}
    there = [name for name in DENOISERS if getattr(pipe, name, None) is not None]
    for name in given:
        if name not in there:
            raise typer.BadParameter(f"--statistics-2 is of {name}, which {type(pipe).__name__} has not")
    return {name: Statistics.load(source) for name, source in given.items()}


def _of_reference(pipe: Any, reference: Any, base_model: str | None, license: str | None) -> tuple[str | None, ...]:
    """(base_model, license) as given; where they are not, and the quantized model does not know, of the reference."""
    known, found = original(pipe), original(reference)
    if "base_model" not in known:
        base_model = base_model or found.get("base_model")
    if license is None and "license" not in known and base_model is None:
        license = found.get("license")
    return base_model, license
