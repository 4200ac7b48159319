# SPDX-License-Identifier: Apache-2.0
"""For each site the transforms and the weight rounding of least output error, all of them within a budget of bytes.

Measured on the tokens that calibration kept: which of scaling, rotation, both or neither, then what 4, 6 or 8 bits, in
groups of channels or not, would cost and leave as error. An integer programme then spends the budget (allocation.py).
Modulation linears, which run on one vector a sample, keep the bits they are given: their error is the same for all
tokens of a picture, which no sum over tokens shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from diffusers_dq.allocation import allocate
from diffusers_dq.balancing import ALPHAS, balance
from diffusers_dq.costs import stored_bits
from diffusers_dq.methods.base import (
    METHODS,
    Method,
    MethodOptions,
    Site,
    Solution,
    sites_to_transform,
    token_or_tensor,
)
from diffusers_dq.scheme import QuantScheme, fitting_group
from diffusers_dq.transforms import NOT_ROTATED, Chain, Rotate, Scale

WEIGHTS = ((4, 0), (4, 128), (4, 64), (4, 32), (6, 0), (8, 0))  # bits, and channels that share a scale


@dataclass(frozen=True, kw_only=True)
class AutoOptions(MethodOptions):
    """budget: mean bits a weight in the file, scales included, over the linears that are chosen for: those of tokens,
        not in `overrides`; None is what the configuration's weight_bits and group_size take by themselves, and
        `extra_bits` more.
    dynamic: activation scales a token at run time, else static ones a tensor.
    online: also scale inputs that nothing upstream can carry, in the quantize step.   seed: of the rotation.
    """

    budget: float | None = None
    extra_bits: float = 0.0
    dynamic: bool = True
    online: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.budget <= 0:
            raise ValueError(f"budget must be above 0 bits a weight, got {self.budget}")
        if self.extra_bits < 0:
            raise ValueError(f"extra_bits must be at least 0, got {self.extra_bits}")


@METHODS.register("auto")
class Auto(Method):
    Options: ClassVar[type[MethodOptions]] = AutoOptions
    summary = "transforms, bits and group size chosen a site by measured output error, within a budget of bits"
    options: AutoOptions

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return token_or_tensor(bits, self.options.dynamic)

    def solve(self, sites: Sequence[Site], timesteps: Tensor | None) -> Solution:
        scaled = {site.name for site in sites_to_transform(sites, self.options.online)}
        chains, notes = {}, {}
        for site in sites:
            if site.transformable:
                candidates = self._chains(site, site.name in scaled)
                chains[site.name] = min(candidates, key=site.output_error)
                if not any(chain.rotation for chain in candidates):
                    notes[site.name] = NOT_ROTATED
        chosen = self._schemes([site for site in sites if site.may_choose and site.transformable], chains)
        described = {name: f"auto: {_described(chains.get(name, Chain()))}" for name in chosen}
        return Solution(chains, described | notes, chosen)

    def _chains(self, site: Site, scaled: bool) -> list[Chain]:
        rotation = Rotate.random(site.weights[0].shape[1], self.options.seed)
        largest, weight_max = site.input_max().amax(0), site.weight_max()
        scales = [Scale(balance(largest, weight_max, alpha)) for alpha in ALPHAS] if scaled else []
        plain = [Chain(), *(Chain((scale,)) for scale in scales)]
        return plain if rotation is None else [*plain, *(replace(chain, rotation=rotation) for chain in plain)]

    def _schemes(self, sites: Sequence[Site], chains: dict[str, Chain]) -> dict[str, QuantScheme]:
        """The weight scheme of each site, by the least sum of relative output errors within the budget."""
        options = [_weight_schemes(self, site) for site in sites]
        errors = [
            [_relative_error(site, scheme, chains.get(site.name, Chain())) for scheme in schemes]
            for site, schemes in zip(sites, options, strict=True)
        ]
        values = sum(weight.numel() for site in sites for weight in site.weights) or 1
        costs = [
            [_stored(site, [scheme] * len(site.weights)) / values for scheme in schemes]
            for site, schemes in zip(sites, options, strict=True)
        ]
        chosen = allocate(errors, costs, self._budget(sites, values))
        return {site.name: schemes[i] for site, schemes, i in zip(sites, options, chosen, strict=True)}

    def _budget(self, sites: Sequence[Site], values: int) -> float:
        """Mean bits a weight."""
        if self.options.budget is not None:
            return self.options.budget
        return sum(_stored(site, site.weight_schemes) for site in sites) / values + self.options.extra_bits


def _weight_schemes(method: Method, site: Site) -> list[QuantScheme]:
    width = site.weights[0].shape[1]
    fitting = [(bits, size) for bits, size in WEIGHTS if not size or fitting_group(width, size) == size]
    return [method.weight_scheme(bits, width, size) for bits, size in fitting]


def _relative_error(site: Site, scheme: QuantScheme, chain: Chain) -> float:
    rounded = replace(site, weight_schemes=(scheme,) * len(site.weights))
    return rounded.output_error(chain) / max(site.output_energy(), 1e-30)


def _stored(site: Site, schemes: Sequence[QuantScheme | None]) -> float:
    """Bits in the file."""
    return sum(stored_bits(scheme, *weight.shape) for scheme, weight in zip(schemes, site.weights, strict=True))


def _described(chain: Chain) -> str:
    parts = ["scaled"] * bool(chain.transforms) + ["rotated"] * (chain.rotation is not None)
    return " and ".join(parts) or "not transformed"
