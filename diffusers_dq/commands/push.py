# SPDX-License-Identifier: Apache-2.0
"""`diffusers-dq push ...`"""

from typing import Annotated

import typer

import diffusers_dq as dq
from diffusers_dq.commands.console import device_of, emit
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
from diffusers_dq.evaluation.loading import load_pipeline
from diffusers_dq.hub import push_to_hub
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
    statistics: StatisticsFile = None,
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

    With --compare-with both models run on the same seeds first, and the card shows how far apart they are. The token
    is the one of `hf auth login`, or of HF_TOKEN.
    """
    if len(repo_id.split("/")) != 2 or not all(repo_id.split("/")):
        raise typer.BadParameter(f"OWNER/NAME is a repository's, as me/dit-w4a8; got {repo_id!r}")
    observed = Statistics.load(statistics) if statistics is not None else None
    place = device_of(device)
    pipe = load_pipeline(model, dtype, place)
    comparison = None
    if compare_with:
        reference = load_pipeline(compare_with, dtype, place)
        arguments = conditions.calls_of(reference)
        comparison = dq.compare(reference, pipe, arguments, num_inference_steps=steps, seed=seed, component=component)
    commit = push_to_hub(
        pipe,
        repo_id,
        comparison=comparison,
        statistics=observed,
        base_model=base_model,
        license=license,
        private=private,
        revision=revision,
    )
    content = {
        "model": model,
        "repo_id": repo_id,
        "revision": revision,
        "commit": commit.oid,
        "url": commit.commit_url,
    }
    emit(content, f"pushed: {commit.commit_url}", as_json=json)
