# SPDX-License-Identifier: Apache-2.0
"""Second moments of a unit's inputs when the units before it are quantized: what GPTQ asks for, a unit at a time.

Calibration can sum them for all linears at once (second_moments=True), over every step and token, in 4 K^2 bytes a
linear. Here they come from running the kept inputs again, and only one unit's are in memory.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from diffusers_dq.inputs import InputMoments
from diffusers_dq.observers import StepObserver
from diffusers_dq.replay import Replay, run_up_to, swapped


@torch.no_grad()
def unit_moments(
    replay: Replay, unit: str, sites: Sequence[str], layers: Mapping[str, nn.Module]
) -> dict[str, InputMoments]:
    """Of the inputs of the linears `sites`, all inside the unit, with `layers` in place of those of earlier units."""
    seen = sorted({float(replay.noisiest(timestep)) for timestep in replay.timesteps()})
    observers = {site: StepObserver(site, seed=0, tokens_per_step=1, second_moments=True) for site in sites}
    step = 0

    def observe(site: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        observers[site].update(args[0], step)

    with ExitStack() as stack:
        stack.enter_context(swapped(replay.model, layers))
        for site in sites:
            module = replay.model.get_submodule(site)
            stack.callback(module.register_forward_pre_hook(partial(observe, site)).remove)
        for timestep, sample in replay.inputs():
            step = seen.index(float(replay.noisiest(timestep)))
            run_up_to(replay.model, unit, sample)
    timesteps = torch.tensor(seen)
    return {site: _moments(observer, timesteps) for site, observer in observers.items()}


def _moments(observer: StepObserver, timesteps: Tensor) -> InputMoments:
    observer.pad_to(len(timesteps))
    tensors, products = observer.to_tensors(), observer.products
    assert products is not None
    return InputMoments(products, tensors["sums"], tensors["counts"], timesteps)
