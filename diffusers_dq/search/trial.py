# SPDX-License-Identifier: Apache-2.0
"""A copy of a transformer in which any linear takes any of several quantized forms, at once and reversibly.

A conversion of the whole model for each candidate of a search would round every weight again. Here a linear is rounded
once for each choice, as a layer that makes the method's transform online and leaves its own output alone. Exchanging
such layers gives the function of the converted model, but that a weight which would carry a transform for a linear
downstream is rounded without it. Attention products stay in floating point.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from diffusers_dq.building import build_linear
from diffusers_dq.config import DQConfig
from diffusers_dq.conversion import Conversion
from diffusers_dq.costs import Choice, stored_bits
from diffusers_dq.denoise import TimestepArgument
from diffusers_dq.installation import BOUNDARIES, GROUPS, SelectGroup
from diffusers_dq.layout import NOT_ROUNDED, Bits
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.planning import LinearPlan
from diffusers_dq.statistics import Statistics
from diffusers_dq.step_policy import StepBits
from diffusers_dq.timesteps import TimestepGroups, boundary_table

_MOST_TOKENS = 512  # of a linear's sample that its error is measured on


@dataclass(frozen=True)
class Layer:
    """A linear that is to be quantized.

    own: the choice that the configuration makes by itself.   pinned: named by one of its overrides, so not searched.
    site: the first linear of those that read the same input.
    """

    name: str
    out_features: int
    in_features: int
    own: Choice
    pinned: bool
    site: str

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


def layers_of(model: nn.Module, config: DQConfig, statistics: Statistics | None) -> tuple[Layer, ...]:
    """Every linear that the configuration converts, in the order of the model's spec.

    Raises ValueError as `dq.quantize` does, and where the configuration converts none.
    """
    conversion = Conversion(model, config, statistics, _dtype(model))
    layers = []
    for group in conversion.spec.groups:
        names = [name for name in group.linears if name in conversion.plan.linears]
        layers += [_layer(model, name, config, names[0]) for name in names]
    if not layers:
        raise ValueError("the configuration leaves every linear in full precision, so there is nothing to choose")
    return tuple(layers)


def _layer(model: nn.Module, name: str, config: DQConfig, site: str) -> Layer:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    bits = config.bits_of(name)
    own = Choice(bits.weight, bits.activation, config.recipe_of(name).group_size)
    pinned = any(fnmatchcase(name, glob) for glob in config.overrides)
    return Layer(name, linear.out_features, linear.in_features, own, pinned, site)


class Trial:
    """model: a copy in full precision, in which `using` exchanges linears. The model given is never changed.

    choices: of each linear that may be exchanged; the attribute lacks those that its width does not allow.
    Memory: the copy, and with `keep` each linear once for each choice that was used.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DQConfig,
        statistics: Statistics | None,
        choices: Mapping[str, Sequence[Choice]],
        keep: bool = True,
    ) -> None:
        self.model = copy.deepcopy(model)
        self._keep = keep
        self._dtype = _dtype(model)
        self._linears = {name: _linear(self.model, name) for name in choices}
        self._layers: dict[tuple[str, Choice], nn.Linear] = {}
        self._plans, descending, step_bits = _plans(self.model, config, statistics, choices)
        self.choices = {name: [c for c in some if (name, c) in self._plans] for name, some in choices.items()}
        _check_choices(self.choices, choices)
        self._partitions = sorted({plan.boundaries for plan in self._plans.values()})
        self._groups = TimestepGroups(len(self._partitions))
        self._boundaries = boundary_table(self._partitions)
        if self._boundaries.numel() or step_bits is not None:
            self._select_groups(descending, step_bits)

    def _select_groups(self, descending: bool, step_bits: StepBits | None) -> None:
        device = next(iter(self._linears.values())).weight.device
        self.model.add_module(GROUPS, self._groups.to(device))
        if self._boundaries.numel():
            self.model.register_buffer(BOUNDARIES, self._boundaries.to(device))
        select = SelectGroup(TimestepArgument.of(self.model), descending, step_bits)
        self.model.register_forward_pre_hook(select, with_kwargs=True)

    def stored_bits(self, name: str, choice: Choice) -> int:
        """Of the linear's weight in the file; see costs.stored_bits."""
        linear, plan = self._linears[name], self._plans[name, choice]
        unrounded = 8 * linear.weight.element_size()
        return stored_bits(plan.weight_scheme, linear.out_features, linear.in_features, unrounded)

    def bits(self, name: str, choice: Choice) -> Bits:
        """As the linear has them with such a choice: an input of one vector a sample is never rounded."""
        planned = next(
            plan
            for (linear, known), plan in self._plans.items()
            if linear == name and replace(known, group_size=choice.group_size) == choice
        )
        return planned.bits

    def layer(self, name: str, choice: Choice) -> nn.Linear:
        """The linear as it is with this choice; itself where the choice rounds nothing."""
        if choice.weight_bits == choice.activation_bits == NOT_ROUNDED:
            return self._linears[name]
        if (name, choice) in self._layers:
            return self._layers[name, choice]
        plan = self._plans[name, choice]
        partition = self._partitions.index(plan.boundaries)
        with torch.no_grad():
            layer = build_linear(self._linears[name], plan, partition, self._groups, self._dtype)
        if self._keep:
            self._layers[name, choice] = layer
        return layer

    @contextmanager
    def using(self, chosen: Mapping[str, Choice]) -> Iterator[nn.Module]:
        """The model with these linears exchanged, all others in full precision."""
        try:
            for name, choice in chosen.items():
                self.model.set_submodule(name, self.layer(name, choice))
            yield self.model
        finally:
            for name in chosen:
                self.model.set_submodule(name, self._linears[name])

    @torch.no_grad()
    def output_error(self, name: str, choice: Choice, statistics: Statistics) -> float:
        """sum |y - y^|^2 / sum |y|^2 of the linear's own output on sampled tokens of its input, no model run.

        y without the bias, which would hide errors where it is large.
        Raises ValueError where the statistics do not know the linear's input.
        """
        site = statistics.input_of(name)
        if site is None or not site.visited.any():
            raise ValueError(f"{name} was never reached during calibration, so its input is unknown; calibrate again")
        linear, layer = self._linears[name], self.layer(name, choice)
        every = max(1, site.tokens.shape[0] * site.tokens.shape[1] // _MOST_TOKENS)
        boundaries = self._boundaries.to(linear.weight.device)
        error = energy = 0.0
        for timestep, tokens in zip(statistics.timesteps[::every], site.tokens[::every], strict=True):
            if boundaries.numel():
                self._groups.select(boundaries, timestep, statistics.descending)
            x = tokens.to(linear.weight)
            y = linear(x)
            error += float((layer(x) - y).double().square().sum())
            energy += float((y if linear.bias is None else y - linear.bias).double().square().sum())
        return error / energy if energy else 0.0


def _plans(
    model: nn.Module, config: DQConfig, statistics: Statistics | None, choices: Mapping[str, Sequence[Choice]]
) -> tuple[dict[tuple[str, Choice], LinearPlan], bool, StepBits | None]:
    """The plan of each linear with each of its choices, self-contained; whether noise falls with the timestep; the
    step policy.

    A plan of the whole model for each distinct choice: a method that looks at all bits of a site, as ViDiT-Q does for
    its alpha, sees them equal.
    """
    plans = {}
    descending, step_bits = True, None
    for choice in sorted({choice for some in choices.values() for choice in some}):
        names = [name for name, some in choices.items() if choice in some]
        overrides = {**config.overrides, **{name: choice.override for name in names}}
        conversion = Conversion(model, config.copy(overrides=overrides), statistics, _dtype(model))
        descending, step_bits = conversion.descending, conversion.plan.step_bits
        for name in names:
            if name not in conversion.plan.linears:
                continue
            plans[name, choice] = replace(conversion.plan.linears[name], rows=(), online=True)
    return plans, descending, step_bits


def _check_choices(possible: Mapping[str, Sequence[Choice]], wanted: Mapping[str, Sequence[Choice]]) -> None:
    for name, some in possible.items():
        if not some:
            tried = ", ".join(map(str, wanted[name]))
            raise ValueError(f"{name} can have none of {tried}; add it to modules_to_not_convert, or allow other bits")


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear) and not isinstance(linear, QuantizedLinear)
    return linear


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
