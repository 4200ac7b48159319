# SPDX-License-Identifier: Apache-2.0
"""Runs a model again on the inputs that calibration kept, with other layers in place if need be."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_dq.denoise import TimestepArgument
from diffusers_dq.model_inputs import ModelInput, moved, timestep_of
from diffusers_dq.statistics import Statistics
from diffusers_dq.step_policy import StepBits
from diffusers_dq.timesteps import Boundaries, TimestepGroups, boundary_table


class Replay:
    """The model is as it was whenever no method of this class is running."""

    def __init__(
        self,
        model: nn.Module,
        statistics: Statistics,
        groups: TimestepGroups,
        partitions: Sequence[Boundaries],
        step_bits: StepBits | None = None,
    ) -> None:
        """groups, partitions: those that layers in place of the model's own read.   step_bits: of their activations.

        Raises ValueError where calibration kept no inputs.
        """
        if not statistics.samples:
            raise ValueError("this needs whole inputs of the transformer: calibrate with samples=32 or more")
        self.model, self.statistics, self.groups = model, statistics, groups
        self.device = next(model.parameters()).device
        self._boundaries = boundary_table(partitions)
        self._step_bits = step_bits
        self._timestep = TimestepArgument.of(model).name

    def select(self, timestep: Tensor) -> None:
        descending = self.statistics.descending
        self.groups.select(self._boundaries, timestep, descending)
        if self._step_bits is not None:
            self.groups.activation_bits = self._step_bits.at(float(timestep.max() if descending else timestep.min()))

    def inputs(self) -> Iterator[tuple[Tensor, ModelInput]]:
        """Timesteps [n] and input of each sample, on the model's device, its timestep group selected."""
        dtypes = self.statistics.dtypes_for(self.model)
        for sample in self.statistics.samples:
            timestep = timestep_of(sample, self._timestep)
            self.select(timestep)
            yield timestep, moved(sample, self.device, dtypes)

    @torch.no_grad()
    def outputs(self, layers: Mapping[str, nn.Module]) -> list[tuple[Tensor, Tensor]]:
        """Timesteps [n] and what the model predicts from each sample with `layers` in place, on the CPU."""
        with swapped(self.model, layers):
            return [(timestep, prediction(self.model(**sample)).cpu()) for timestep, sample in self.inputs()]


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with other modules under these names, for the time being."""
    originals = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


def prediction(output: Any) -> Tensor:
    """The sample in what a diffusers transformer returns."""
    sample: Tensor = output.sample if hasattr(output, "sample") else output[0]
    return sample
