# SPDX-License-Identifier: Apache-2.0
"""What a method is: it chooses, for each group of linears, transforms, schemes and how ranges are found.

Where a transform's two halves go, and the rounding itself, are the planner's (planning.py): no method repeats them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_dq.checks import check_fields
from diffusers_dq.recipe import Recipe
from diffusers_dq.registry import Registry
from diffusers_dq.scheme import QuantScheme, fitting_group
from diffusers_dq.statistics import SiteStatistics
from diffusers_dq.transforms import Chain


@dataclass(frozen=True)
class Site:
    """A LinearGroup as a method sees it.

    weights: [N, K] each, of the group's linears that are converted (without values while loading streams them).
    statistics: of the group's input, where the method needs them and the input is ever rounded.
    transformable: whether a change of its input can help: not where the input is never rounded.
    has_producer: whether something upstream could carry a change.
    bits: of weight and input, the fewest of the group's linears; 16 is not rounded.
    """

    name: str
    weights: tuple[Tensor, ...]
    statistics: SiteStatistics | None
    transformable: bool
    has_producer: bool
    bits: tuple[int, int] = (8, 8)

    def weight_max(self) -> Tensor:
        """[K] fp32, max over the rows of all the weights of |W[:, k]|."""
        return torch.stack([weight.abs().amax(dim=0).float().cpu() for weight in self.weights]).amax(dim=0)

    def input_max(self) -> Tensor:
        """[S, K] fp32, max |X_t[:, k]| of each calibrated step. Raises ValueError without statistics."""
        if self.statistics is None:
            raise ValueError(f"{self.name}: no statistics of its input; the method has to ask for them")
        return torch.maximum(self.statistics.maximum, -self.statistics.minimum)


@dataclass(frozen=True)
class Solution:
    """What a method chose, by site name.   chains: none for a site left as it is.   notes: for the report."""

    chains: Mapping[str, Chain]
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Base of a method's options: each field is checked against its annotation."""

    def __post_init__(self) -> None:
        check_fields(self)


class Method(ABC):
    """Subclasses set `Options` (a frozen keyword-only dataclass) and `summary`, and register under their name.

    recipe: how weights are rounded unless the configuration says otherwise.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    summary: ClassVar[str]
    recipe: ClassVar[Recipe] = Recipe()

    def __init__(self, options: Any) -> None:
        self.options = options

    @property
    def needs_statistics(self) -> bool:
        """Whether `solve` or static ranges need calibration."""
        return True

    @abstractmethod
    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        """How inputs of that many channels are rounded, for bits <= 8."""

    def weight_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        """How weights of that many columns are rounded, for bits <= 8.

        group_size: as in Recipe. Groups of 4-bit weights have zero points; of more bits they cannot, the kernels
        multiply weight - zero point as int8.
        """
        size = fitting_group(in_features, group_size)
        if size is None:
            return QuantScheme(bits=bits, granularity="channel")
        return QuantScheme(bits=bits, granularity="group", symmetric=bits > 4, group_size=size)

    def range_boundaries(self, chain: Chain) -> tuple[float, ...]:
        """Timestep partition of the static activation ranges of a site with this chain; () for one range."""
        return ()

    def solve(self, sites: Sequence[Site], timesteps: Tensor | None) -> Solution:
        """Choose transforms.   timesteps: [S], in the order of denoising; None without statistics."""
        return Solution({})


def token_or_tensor(bits: int, dynamic: bool) -> QuantScheme:
    """Of activations: a symmetric scale a token found at run time, or a static range of the whole tensor."""
    return QuantScheme(bits=bits, granularity="token" if dynamic else "tensor", symmetric=dynamic, dynamic=dynamic)


def sites_to_transform(sites: Sequence[Site], online: bool | None) -> list[Site]:
    """The sites whose input a method is to change: those that a producer can carry, with `online` the others too.

    None is True for an architecture of which no producer is known, else False.
    """
    if online is None:
        online = not any(site.has_producer for site in sites)
    return [site for site in sites if site.transformable and (site.has_producer or online)]


METHODS: Registry[type[Method]] = Registry("method")


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """Raises ValueError for an unknown method, TypeError for an unknown option; both list the known ones."""
    method = METHODS[name]
    known = [field.name for field in fields(method.Options)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"method {name!r} has no option {', '.join(unknown)}; its options: {', '.join(known) or 'none'}"
        )
    return method(method.Options(**options))
