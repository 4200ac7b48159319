# SPDX-License-Identifier: Apache-2.0
"""Turns a full-precision transformer into a quantized one: everything is built first, then put in place at once."""

import ctypes
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_dq import installation, noise_correction
from diffusers_dq.building import build_linear, build_modulation
from diffusers_dq.config import DQConfig
from diffusers_dq.inputs import InputMoments
from diffusers_dq.installation import Description
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.methods import Method
from diffusers_dq.modulation import Modulation
from diffusers_dq.noise_correction import NoiseCorrection
from diffusers_dq.planning import LinearPlan, ModulationPlan, Plan, make_plan
from diffusers_dq.reconstruction import Reconstructor
from diffusers_dq.replay import Replay, evaluating, units_of
from diffusers_dq.repository import named_on_hub
from diffusers_dq.specs import SPECS, ModelSpec, spec_of, undescribed
from diffusers_dq.statistics import Statistics
from diffusers_dq.streaming import unit_moments
from diffusers_dq.timesteps import TimestepGroups, boundary_table

Module = TypeVar("Module", bound=nn.Module)

_WORTH_A_FILE = 1 << 20  # bytes of a tensor


class Conversion:
    """One model's way from plan to installed layers.

    Nothing of the model changes before `finish`, so a failure anywhere earlier leaves it as it was. Memory meanwhile:
    the model, one linear's weight in fp64 a few times, and its quantized weights: of a model on the CPU they wait in
    mapped files (`spill`), of which memory holds what it can spare, and stay there as those of a loaded model do. What
    reconstruction decides, and what is on another device, is held in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DQConfig,
        statistics: Statistics | None,
        dtype: torch.dtype,
        method: Method | None = None,
    ) -> None:
        _refuse_fused(model)
        self.model = model
        self.config = config
        self.dtype = dtype
        self.statistics = statistics
        self.spec = _spec(model, statistics)
        known = self.spec.timestep if statistics is None else statistics
        self.descending = known is None or known.descending
        self.plan: Plan = make_plan(model, self.spec, method or config.make_method(), config, statistics)
        self.groups = TimestepGroups(len(self.plan.partitions))
        self.layers: dict[str, QuantizedLinear] = {}
        self.modulations: dict[str, Modulation] = {}
        self.correction: NoiseCorrection | None = None

    def build(self, name: str, linear: nn.Linear) -> QuantizedLinear:
        """The layer that is to replace the linear of this name. Raises ValueError where its weight is not finite, or
        the layer's tables would not be."""
        _check_weight(name, linear)
        try:
            self.layers[name] = _finite(name, self._built(name, linear, self.plan.linears[name]))
        except ValueError:
            for other in self.plan.linears:  # the cause may be in one that this one carries a transform for
                _check_weight(other, self.model.get_submodule(other))
            raise
        return self.layers[name]

    def _built(self, name: str, linear: nn.Linear, plan: LinearPlan) -> QuantizedLinear:
        return build_linear(linear, plan, *self._switching(plan))

    def _switching(self, plan: LinearPlan | ModulationPlan) -> tuple[int, TimestepGroups, torch.dtype, int]:
        """Partition, groups, dtype, and rows of a table that switches."""
        partitions = self.plan.partitions
        return partitions.index(plan.boundaries), self.groups, self.dtype, 1 + max(map(len, partitions))

    def modulations_of(self, unit: str) -> dict[str, Modulation]:
        """Those of the blocks in a unit, or of the block that it is in; of all blocks for ""."""
        found = {}
        for argument, plan in self.plan.modulations.items():
            block = f"{argument.block}."
            if not unit or block.startswith(f"{unit}.") or f"{unit}.".startswith(block):
                modulation = build_modulation(self.model, argument, plan, *self._switching(plan))
                name = f"{argument.block}.{modulation.layout.leaf}"
                found[name] = _finite(name, modulation)
        return found

    @property
    def _built_so_far(self) -> dict[str, nn.Module]:
        return {**self.layers, **self.modulations}

    def reconstruct(self, checkpoint: str | os.PathLike[str] | None, progress: bool) -> None:
        """Learn how the weights are rounded, where the configuration asks for it."""
        if self.config.recipe.rounding != "adaround":
            return
        assert self.statistics is not None
        config = {key: value for key, value in self.config.to_dict().items() if key not in ("result", "statistics")}
        identity = {"config": config, "statistics": self.statistics.identity}
        self.plan = Reconstructor(
            self.model,
            self.plan,
            self._built,
            self.modulations_of,
            self._replay(),
            self.config.reconstruction_settings(),
            identity=identity,
            checkpoint=checkpoint,
        ).run(progress)

    def _replay(self) -> Replay:
        assert self.statistics is not None
        return Replay(self.model, self.statistics, self.groups, self.plan.partitions, self.plan.step_bits)

    def correct_noise(self) -> None:
        """Fit what the built layers do to the model's prediction, where the configuration asks for it."""
        if not self.config.recipe.noise_correction:
            return
        replay = self._replay()
        exact, quantized = replay.outputs({}), replay.outputs(self._built_so_far)
        pairs = [(timestep, x, y) for (timestep, x), (_, y) in zip(exact, quantized, strict=True)]
        channels = noise_correction.channels_of(exact[0][1], _noise_channels(self.model))
        self.correction = _finite(noise_correction.NAME, noise_correction.fit(pairs, channels))

    def build_all(self, progress: bool) -> None:
        names = [name for name in self.plan.linears if name not in self.layers]
        with tqdm(total=len(names), desc="quantize", unit="linear", disable=not progress) as bar:
            for unit, members in units_of(self.model, names, "block").items():
                self._observe(unit, members)
                for name in members:
                    spill(self.build(name, self.model.get_submodule(name)))  # type: ignore[arg-type]
                    _give_back()
                    bar.update()
                self.modulations |= self.modulations_of(unit)
                self._change_plans(members, moments=dict.fromkeys(members))

    def _observe(self, unit: str, names: Sequence[str]) -> None:
        """Find the second moments that GPTQ asks for and calibration has not summed, of one unit's inputs."""
        lacking = {name for name in names if self.plan.linears[name].lacks_moments}
        readers = [[name for name in group.linears if name in lacking] for group in self.spec.groups]
        together = {readers_here[0]: readers_here for readers_here in readers if readers_here}
        if together:
            found = unit_moments(self._replay(), unit, list(together), self._built_so_far)
            self._change_plans(lacking, moments={name: found[first] for first, of in together.items() for name in of})

    def _change_plans(self, names: Collection[str], moments: Mapping[str, InputMoments | None]) -> None:
        changed = {name: replace(self.plan.linears[name], moments=moments[name]) for name in names}
        self.plan = replace(self.plan, linears={**self.plan.linears, **changed})

    def finish(self) -> DQConfig:
        """Install the layers; returns the configuration with its `result`, the one to save."""
        model, plan = self.model, self.plan
        boundaries = boundary_table(plan.partitions)
        self.modulations = self.modulations_of("")
        description = Description(
            linears={name: layer.layout for name, layer in self.layers.items()},
            modulations={name: modulation.layout for name, modulation in self.modulations.items()},
            attention=tuple(plan.attention),
            attention_bits=plan.attention_bits,
            softmax=plan.softmax,
            partitions=(len(boundaries), boundaries.shape[1]),
            descending=self.descending,
            tied=installation.identical(model, self.spec.duplicates),
            notes={name: linear.note for name, linear in plan.linears.items() if linear.note} | dict(plan.kept),
            dtype=self.dtype,
            step_bits=plan.step_bits,
            noise_correction=None if self.correction is None else tuple(self.correction.mean.shape),  # type: ignore[arg-type]
            origin=named_on_hub(str(getattr(model, "config", {}).get("_name_or_path") or "")) or None,
            shared=installation.sharing(self.layers, [group.linears for group in self.spec.groups]),
        )
        device = next(iter(self.layers.values())).weight.device if self.layers else "cpu"
        installation.install(
            model,
            description,
            self.layers,
            self.modulations,
            self.groups.to(device),
            boundaries.to(device),
            plan.attention,
            None if self.correction is None else self.correction.to(device),
        )
        return self.config.copy(result=description.to_dict(), statistics=None)


def _check_weight(name: str, linear: nn.Module) -> None:
    for kind, tensor in linear.named_parameters():
        if tensor.device.type != "meta" and not all(map(torch.isfinite, tensor.aminmax())):  # NaN is both
            raise ValueError(
                f"{name}.{kind} holds NaN or infinite values and cannot be quantized: load a sound checkpoint, or"
                " add it to modules_to_not_convert"
            )


def _finite(name: str, module: Module) -> Module:
    """The module. Raises ValueError where a tensor of it is not finite: no file of it would be loaded again."""
    for kind, tensor in (*module.named_parameters(), *module.named_buffers()):
        held = tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta"
        if held and not all(map(torch.isfinite, tensor.aminmax())):
            raise ValueError(
                f"{name}.{kind} came out as NaN or infinite: the statistics or their samples hold values that are no"
                " numbers, or far too large; calibrate again, or add it to modules_to_not_convert"
            )
    return module


def _noise_channels(model: Any) -> tuple[int, ...]:
    """That the model's prediction may have, without a learned variance, the likeliest first. Raises ValueError where
    its config does not say."""
    known = (getattr(model.config, name, None) for name in ("in_channels", "out_channels"))
    inward, outward = (value if isinstance(value, int) else None for value in known)
    if inward is None and outward is None:
        raise ValueError(f"noise_correction: {type(model).__name__}'s config has no in_channels or out_channels")
    if inward is None or outward is None:
        return (inward or outward or 0,)
    return (inward, outward) if outward == 2 * inward else (outward, inward)


def spill(layer: nn.Module) -> None:
    """Move the large tensors of a layer on the CPU to temporary files that are mapped in their place.

    Raises OSError where there is no room for them, or no folder.
    """
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.device.type == "cpu" and tensor.nbytes >= _WORTH_A_FILE and os.name == "posix":
            tensor.data = _mapped(tensor.detach())


def _mapped(tensor: Tensor) -> Tensor:
    """The same values in a file that is mapped, from a page's start, for as long as the tensor lives.

    The file loses its name at once, so nothing is left of it however the process ends.
    """
    try:
        with tempfile.NamedTemporaryFile(prefix="diffusers_dq-") as file:
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            file.flush()
            mapped = torch.from_file(file.name, size=tensor.nbytes, dtype=torch.uint8)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot keep {tensor.nbytes:,} bytes of quantized weights in a temporary file ({error}): make room in"
            f" {tempfile.gettempdir()}, or set TMPDIR to a folder on a disk that has some. The model is as it was",
        ) from error
    unshared = torch.from_numpy(mapped.numpy())  # torch takes what it maps for shared memory, and fails to share it
    return unshared.view(tensor.dtype).view(tensor.shape)


def _give_back() -> None:
    """Let glibc return what has been freed.

    A layer's small tables settle in the gaps that its large intermediate results leave, where those of the next linear
    no longer fit: 28 blocks of DiT-XL/2 would take up 1.4 GB more.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _refuse_fused(model: nn.Module) -> None:
    if any(getattr(module, "fused_projections", False) for module in model.modules()):
        raise ValueError(
            "the model's projections are fused, and a saved file could not tell: call unfuse_qkv_projections() first"
        )


def _spec(model: nn.Module, statistics: Statistics | None) -> ModelSpec:
    """The architecture's, else from the groups that calibration discovered, else each linear alone."""
    if statistics is None or SPECS.get(type(model).__name__) is not None:
        return spec_of(model)
    return undescribed(model, (site.linears for site in statistics.sites.values()))


def convert(
    model: nn.Module,
    config: DQConfig,
    statistics: Statistics | None,
    *,
    dtype: torch.dtype,
    progress: bool,
    checkpoint: str | os.PathLike[str] | None = None,
) -> DQConfig:
    """Quantize in place and return the configuration to save. The model is as it was if anything raises."""
    conversion = Conversion(model, config, statistics, dtype)
    if config.recipe.noise_correction:
        _noise_channels(model)  # now, rather than after everything is built
    with evaluating(model):
        conversion.reconstruct(checkpoint, progress)
        conversion.build_all(progress)
        conversion.correct_noise()
    return conversion.finish()
