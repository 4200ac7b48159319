# SPDX-License-Identifier: Apache-2.0
"""Runs a model again on the inputs that calibration kept, with other layers in place if need be."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_dq.denoise import TimestepArgument
from diffusers_dq.model_inputs import ModelInput, moved, timestep_of
from diffusers_dq.modulation import Modulation, attach_all, detach
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

    def noisiest(self, timestep: Tensor) -> Tensor:
        """The entry that decides on the group, []."""
        return timestep.amax() if self.statistics.descending else timestep.amin()

    def timesteps(self) -> list[Tensor]:
        """Of each sample, [n]."""
        return [timestep_of(sample, self._timestep) for sample in self.statistics.samples]

    def inputs(self) -> Iterator[tuple[Tensor, ModelInput]]:
        """Timesteps [n] and input of each sample, on the model's device, its timestep group selected.

        Meanwhile the model is in evaluation mode.
        """
        dtypes = self.statistics.dtypes_for(self.model)
        with evaluating(self.model):
            for sample in self.statistics.samples:
                timestep = timestep_of(sample, self._timestep)
                self.select(timestep)
                same = moved(sample[self._timestep], self.device)  # bf16 has no 999
                yield timestep, {**moved(sample, self.device, dtypes), self._timestep: same}

    @torch.no_grad()
    def outputs(self, layers: Mapping[str, nn.Module]) -> list[tuple[Tensor, Tensor]]:
        """Timesteps [n] and what the model predicts from each sample with `layers` in place, on the CPU."""
        with swapped(self.model, layers):
            return [(timestep, prediction(self.model(**sample)).cpu()) for timestep, sample in self.inputs()]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for the time being: in training DiT forgets a tenth of its labels, at random, and a
    model that `from_pretrained` is about to return is not in evaluation mode yet."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with other modules under these names, and with these modulations, for the time being."""
    modulations = {name: module for name, module in modules.items() if isinstance(module, Modulation)}
    originals = {name: model.get_submodule(name) for name in modules.keys() - modulations.keys()}
    try:
        for name in originals:
            model.set_submodule(name, modules[name])
        attach_all(model, modulations)
        yield
    finally:
        for name in modulations:
            detach(model.get_submodule(name.rpartition(".")[0]))
        for name, module in originals.items():
            model.set_submodule(name, module)


def prediction(output: Any) -> Tensor:
    """The sample in what a diffusers transformer returns; a list of samples (Z-Image, Cosmos 3) is stacked.

    Raises ValueError for a list of samples of several shapes.
    """
    sample = output.sample if hasattr(output, "sample") else output[0]
    if isinstance(sample, Tensor):
        return sample
    shapes = {tuple(part.shape) for part in sample}
    if len(shapes) != 1:
        raise ValueError(f"samples of one forward have to be of one shape to be compared, got {sorted(shapes)}")
    return torch.stack(list(sample))


class _Reached(Exception):
    """The unit has run, and nothing behind it has to."""


def run_up_to(model: nn.Module, unit: str, sample: ModelInput) -> tuple[tuple[Any, ...], Any, tuple[Tensor, ...]]:
    """Arguments and outputs of a unit in the model's forward on the sample. Raises ValueError if it is never run."""
    found: list[tuple[tuple[Any, ...], Any, tuple[Tensor, ...]]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.append((args, kwargs, tensors_in(output)))
        raise _Reached

    handle = model.get_submodule(unit).register_forward_hook(hook, with_kwargs=True)
    try:
        model(**sample)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise ValueError(f"{unit} is never run by a forward of {type(model).__name__}, so its rounding cannot be learned")


def tensors_in(output: Any) -> tuple[Tensor, ...]:
    parts = output if isinstance(output, tuple | list) else (output,)
    return tuple(part for part in parts if isinstance(part, Tensor))


def units_of(model: nn.Module, linears: Sequence[str], unit: str, apart: Collection[str] = ()) -> dict[str, list[str]]:
    """Unit -> the linears in it, in the order of the model's modules.

    A block is a member of an outermost nn.ModuleList. A linear outside of all blocks, or among `apart`, is a unit of
    its own; those apart come first, for what they put out is the same whatever other units do.
    """
    blocks = [] if unit == "layer" else [f"{name}." for name in blocks_of(model)]
    units: dict[str, list[str]] = {}
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    for name in sorted(linears, key=lambda name: (name not in apart, order[name])):
        block = (
            f"{name}." if name in apart else next((block for block in blocks if name.startswith(block)), f"{name}.")
        )
        units.setdefault(block[:-1], []).append(name)
    return units


def blocks_of(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the members of the outermost module lists, and of lists in lists: what is called as a module."""
    for name, child in module.named_children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield f"{prefix}{name}"
        else:
            yield from blocks_of(child, f"{prefix}{name}.")
