# SPDX-License-Identifier: Apache-2.0
"""Runs of pipelines that a search measures: private copies, final latents, pictures."""

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffusers_dq.denoise import Call, denoiser, quiet, run_call


def with_transformer(
    pipe: DiffusionPipeline, transformer: nn.Module, component: str | None = None
) -> DiffusionPipeline:
    """A pipeline of this transformer, in place of the component, and a scheduler of its own; it shares all else with
    `pipe`, which is left as it is."""
    private = copy.copy(pipe)
    setattr(private, component or "transformer", transformer)
    private.scheduler = copy.deepcopy(pipe.scheduler)
    return private


def final_latents(
    pipe: DiffusionPipeline, calls: Sequence[Call], *, num_inference_steps: int, seed: int
) -> list[Tensor]:
    """What the scheduler's last step makes of each call, on the CPU. Call i runs under a CPU generator of seed + i.

    Nothing is decoded: a call ends with that step. The pipeline is as before, but for its scheduler's counters.
    """
    found = []
    with quiet(pipe), torch.no_grad():
        for i, call in enumerate(calls):
            with _last_step(pipe.scheduler) as last:
                run_call(pipe, call, num_inference_steps=num_inference_steps, seed=seed + i, output_type="latent")
            if not last:
                raise ValueError(
                    f"{type(pipe).__name__} did not call its scheduler's step, so its final latents are unknown; give"
                    " the search a fitness of your own, a function of a pipeline"
                )
            found.append(last[0])
    return found


class _Finished(Exception):
    """Leaves a pipeline's call once its latents are final."""


@contextmanager
def _last_step(scheduler: Any) -> Iterator[list[Tensor]]:
    """Holds the newest sample that the scheduler's step gave; ends the call after the last of its timesteps."""
    newest: list[Tensor] = []
    steps = [0]
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its signature
    def watched(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        sample = output[0] if isinstance(output, tuple) else output.prev_sample
        newest[:] = [sample.detach().to("cpu", copy=True)]
        steps[0] += 1
        if steps[0] == len(scheduler.timesteps):
            raise _Finished
        return output

    before = vars(scheduler).get("step")
    scheduler.step = watched
    try:
        yield newest
    except _Finished:
        pass
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before


def pictures(
    pipe: DiffusionPipeline, calls: Sequence[Call], *, num_inference_steps: int, seed: int
) -> list[np.ndarray]:
    """What the pipeline makes of each call with output_type="np": pictures [B, H, W, C] or videos, in [0, 1]."""
    with quiet(pipe), torch.no_grad():
        return [
            np.asarray(run_call(pipe, call, num_inference_steps=num_inference_steps, seed=seed + i, output_type="np"))
            for i, call in enumerate(calls)
        ]


def tokens_of(
    pipe: DiffusionPipeline, layers: Sequence[str], calls: Sequence[Call], seed: int, component: str | None = None
) -> dict[str, float]:
    """Tokens that each of these linears reads in one forward of the transformer, on average over the calls.

    Two denoising steps of each call tell, ten where two transformers share them: the number does not change along a
    trajectory.
    """
    model = denoiser(pipe, component)
    rows = dict.fromkeys(layers, 0)
    forwards = [0]

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows[name] += args[0].numel() // args[0].shape[-1]

        return hook

    def forward(module: nn.Module, args: tuple[Any, ...]) -> None:
        forwards[0] += 1

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(forward).remove)
        for name in layers:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(count(name)).remove)
        final_latents(pipe, calls, num_inference_steps=2 if component is None else 10, seed=seed)
    return {name: count / max(1, forwards[0]) for name, count in rows.items()}
