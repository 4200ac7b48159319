# SPDX-License-Identifier: Apache-2.0
"""What a method is: it chooses, for each group of linears, transforms, schemes and how ranges are found.

Where a transform's two halves go, and the rounding itself, are the planner's (planning.py): no method repeats them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffusers_dq import affine
from diffusers_dq.checks import check_fields
from diffusers_dq.low_rank import approximate_factors, is_worth_it
from diffusers_dq.recipe import Recipe
from diffusers_dq.registry import Registry, meant
from diffusers_dq.scheme import QuantScheme, fitting_group
from diffusers_dq.shifting import midpoints
from diffusers_dq.skewed_steps import draw_steps
from diffusers_dq.statistics import SiteStatistics
from diffusers_dq.timesteps import Boundaries, group_of
from diffusers_dq.transforms import Chain


@dataclass(frozen=True)
class Site:
    """A LinearGroup as a method sees it.

    weights: [N, K] each, of the group's linears that are converted (without values while loading streams them).
    statistics: of the group's input, where the method needs them and the input is ever rounded.
    transformable: whether a change of its input can help: not where the input is never rounded.
    has_producer: whether something upstream could carry a change.
    weight_schemes: how each weight is to be rounded, None where it is not.   scheme: of the input, likewise, that of
        fewest bits where linears differ.   low_rank: rank of what is kept apart from the rounded weight (Recipe).
    sample_maxima: runs the model to find `sample_max`.
    overridden: whether the user set bits or group size of one of its linears.
    """

    name: str
    weights: tuple[Tensor, ...]
    statistics: SiteStatistics | None
    transformable: bool
    has_producer: bool
    weight_schemes: tuple[QuantScheme | None, ...] = ()
    scheme: QuantScheme | None = None
    low_rank: int = 0
    sample_maxima: Callable[[], Tensor] | None = None
    overridden: bool = False

    def weight_max(self) -> Tensor:
        """[K] fp32, max over the rows of all the weights of |W[:, k]|."""
        return torch.stack([weight.abs().amax(dim=0).float().cpu() for weight in self.weights]).amax(dim=0)

    def input_max(self) -> Tensor:
        """[S, K] fp32, max |X_t[:, k]| of each calibrated step. Raises ValueError without statistics."""
        if self.statistics is None:
            raise ValueError(f"{self.name}: no statistics of its input; the method has to ask for them")
        return torch.maximum(self.statistics.maximum, -self.statistics.minimum)

    def sample_max(self) -> Tensor:
        """[n, K] fp32, max |X_i[:, k]| of each picture i in the kept samples. Raises ValueError without samples."""
        if self.sample_maxima is None:
            raise ValueError(f"{self.name}: no samples were kept of it; the method has to ask for statistics")
        return self.sample_maxima()

    def midpoints(self) -> Tensor:
        """[S, K] fp32, the middle of each channel's range at each step. Raises ValueError without statistics."""
        if self.statistics is None:
            raise ValueError(f"{self.name}: no statistics of its input; the method has to ask for them")
        return midpoints(self.statistics.minimum, self.statistics.maximum)

    def tokens(self, most: int = 256) -> Tensor:
        """[S, R, K] fp32, as many tokens of each step as make `most`, at least one. Raises ValueError without any."""
        if self.statistics is None:
            raise ValueError(f"{self.name}: no statistics of its input; the method has to ask for them")
        tokens = self.statistics.tokens
        return tokens[:, : max(1, most // len(tokens))].float()

    @property
    def may_choose(self) -> bool:
        """Whether a method may round its weights otherwise than was asked for."""
        return not self.overridden and None not in self.weight_schemes

    def output_energy(self) -> float:
        """sum |x W^T|^2 over the tokens and linears of `output_error`."""
        tokens = self.tokens()
        return sum(float((tokens @ weight.float().cpu().T).square().sum()) for weight in self.weights)

    def output_error(self, chain: Chain, timesteps: Tensor | None = None) -> float:
        """sum |x W^T - u^ W'^^T - b'_g|^2 over sampled tokens and the site's linears, weights rounded to nearest.

        A static input counts as rounded by the range of all the sampled tokens. timesteps: [S], for a chain that
        changes with them.
        """
        tokens = self.tokens()
        group = torch.zeros(len(tokens), dtype=torch.int64)
        if timesteps is not None:
            group = group_of(timesteps, chain.boundaries)
        u = chain.forward(tokens, group)
        u_rounded = u if self.scheme is None else _rounded_input(u, self.scheme)
        error = 0.0
        for weight, scheme in zip(self.weights, self.weight_schemes, strict=True):
            weight = weight.float().cpu()
            folded, bias = chain.fold(weight, weight.new_zeros(1, len(weight)))
            output = tokens @ weight.T - bias.expand(int(group.max()) + 1, -1)[group][:, None]
            if is_worth_it(self.low_rank, folded.shape):
                down, up = approximate_factors(folded, self.low_rank)
                folded = folded - up @ down
                output -= u @ down.T @ up.T
            if scheme is not None:
                folded = affine.quantize_weight(folded, scheme).dequantized()
            error += float((output - u_rounded @ folded.T).square().sum())
        return error


def _rounded_input(u: Tensor, scheme: QuantScheme) -> Tensor:
    if scheme.dynamic:
        return affine.rounded_dynamic(u, scheme)
    scale, zero_point = affine.affine_parameters(u.amin(), u.amax(), scheme)
    return affine.rounded(u, scale, zero_point, scheme)


@dataclass(frozen=True)
class Solution:
    """What a method chose, by site name.   chains: none for a site left as it is.   notes: for the report.
    weight_schemes: in place of `Method.weight_scheme`'s, of linears that no override names."""

    chains: Mapping[str, Chain]
    notes: Mapping[str, str] = field(default_factory=dict)
    weight_schemes: Mapping[str, QuantScheme] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Base of a method's options: each field is checked against its annotation."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class DrawnSteps(MethodOptions):
    """mean, deviation: of the normal distribution that calibration steps are drawn from, in shares of the schedule, 0
        the clean end. PTQ4DM's mean is below one half; the deviation is ours.
    draws, seed: how many are drawn, and from which random numbers. Steps count once, however often they are drawn.
    """

    mean: float = 0.4
    deviation: float = 0.2
    draws: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mean <= 1 or self.deviation <= 0 or self.draws < 1:
            raise ValueError(
                "mean must be in [0, 1], deviation above 0 and draws at least 1, got"
                f" {self.mean}, {self.deviation} and {self.draws}"
            )

    def of(self, timesteps: Tensor) -> Tensor:
        """[S] bool."""
        return draw_steps(timesteps, self.mean, self.deviation, self.draws, self.seed)


class Method(ABC):
    """Subclasses set `Options` (a frozen keyword-only dataclass) and `summary`, and register under their name.

    recipe: how weights are rounded unless the configuration says otherwise.
    softmax: how attention probabilities are rounded where they are: in uniform steps, or to powers of sqrt(1/2).
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    summary: ClassVar[str]
    recipe: ClassVar[Recipe] = Recipe()
    softmax: ClassVar[Literal["uniform", "log_sqrt2"]] = "uniform"

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

    @property
    def rounds_conditioning(self) -> bool:
        """Whether linears that run on one vector a sample have their input rounded too: they gain nothing in speed."""
        return False

    def calibration_steps(self, timesteps: Tensor) -> Tensor:
        """[S] bool: the calibrated steps that `solve` and static ranges are to see, of timesteps [S]."""
        return torch.ones_like(timesteps, dtype=torch.bool)

    def range_boundaries(self, site: Site, chain: Chain, timesteps: Tensor) -> Boundaries:
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


def make_method(name: str, options: Mapping[str, Any], beside: Iterable[str] = ()) -> Method:
    """Raises ValueError for an unknown method, TypeError for an unknown option; both list the known ones.

    beside: what may be set besides the method's options, where a wrong name may have been meant for it.
    """
    method = METHODS[name]
    known = [field.name for field in fields(method.Options)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"method {name!r} has no option {', '.join(unknown)}; its options: {', '.join(known) or 'none'}"
            + meant(unknown[0], [*known, *beside])
        )
    return method(method.Options(**options))
