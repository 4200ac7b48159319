# SPDX-License-Identifier: Apache-2.0
"""What is known of a linear's input before and after its transform: tokens, moments, and the range it is rounded to.

Notation: K channels, G timestep groups, S calibrated steps, R tokens a step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_dq import affine
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.statistics import SiteStatistics
from diffusers_dq.timesteps import Boundaries, group_of
from diffusers_dq.transforms import Chain

_MOST_VALUES = 1 << 18  # that a range search looks at, spread evenly over steps and tokens


@dataclass(frozen=True)
class InputRange:
    """Static quantization of an input.   scale: [R] fp32, zero_point: [R] int32; R = 1, or a row a timestep group."""

    scale: Tensor
    zero_point: Tensor
    boundaries: Boundaries = ()


@dataclass(frozen=True)
class InputSample:
    """Tokens that an input was seen to hold.   tokens: [S, R, K] bf16, of the steps `timesteps` [S]."""

    tokens: Tensor
    timesteps: Tensor

    def transformed(self, chain: Chain) -> Tensor:
        """u = T_g(x), [S, R, K] fp32."""
        return chain.forward(self.tokens.float(), group_of(self.timesteps, chain.boundaries))


@dataclass(frozen=True)
class InputMoments:
    """Sums over all tokens of an input.   sums: [S, K], of x by step.   counts: [S].   products: [K, K], of x x^T."""

    products: Tensor
    sums: Tensor
    counts: Tensor
    timesteps: Tensor

    def means(self, chain: Chain, boundaries: Boundaries) -> Tensor:
        """E[u] of u = T_g(x) over the tokens of each group of a partition that refines the chain's, [G, K] fp64.

        Of a group that holds none of the timesteps, x is as at the nearest of them.
        """
        group = group_of(self.timesteps, boundaries)
        count = self.counts.double()[:, None]
        edges = torch.tensor([*boundaries, torch.inf])  # the upper end of each group is in it
        means = []
        for g, edge in enumerate(edges):
            steps = group == g
            if not steps.any():
                steps = torch.zeros_like(steps)
                steps[(self.timesteps - edges[min(g, len(boundaries) - 1)]).abs().argmin()] = True
            x = self.sums[steps].double().sum(0) / count[steps].sum()
            means.append(chain.forward(x[None], group_of(edge[None], chain.boundaries))[0])
        return torch.stack(means)

    def transformed(self, chain: Chain, centred: Boundaries | None = None) -> Tensor:
        """sum u u^T of u = T_g(x), [K, K] fp64; with `centred` about the mean of u in each group of that partition.

        u = (M x + a_g) R, so sum u u^T = R^T (M P M + sum_t (M s_t a_t^T + a_t s_t^T M + n_t a_t a_t^T)) R.
        """
        multiplier, offset = chain.as_affine(len(self.products))
        offset = offset.expand(len(chain.boundaries) + 1, -1)[group_of(self.timesteps, chain.boundaries)]  # [S, K]
        count = self.counts.double()[:, None]
        sums = self.sums.double() * multiplier
        total = self.products.double().mul_(multiplier).mul_(multiplier[:, None])  # in place: 170 MB for K = 4608
        if offset.any():
            total.addmm_(sums.T, offset).addmm_(offset.T, sums).addmm_(offset.T, count * offset)
        if centred is not None:
            group = group_of(self.timesteps, centred)
            for g in range(len(centred) + 1):
                of_group = (sums + count * offset)[group == g].sum(0)
                total.addr_(of_group, of_group, alpha=-1 / float(count[group == g].sum().clamp(min=1)))
        if chain.rotation is None:
            return total
        none = torch.zeros(1, dtype=torch.int64)
        return chain.rotation.forward(chain.rotation.forward(total, none).T, none)


def static_range(
    site: SiteStatistics,
    timesteps: Tensor,
    chain: Chain,
    scheme: QuantScheme,
    search: affine.RangeSearch,
    boundaries: Boundaries = (),
) -> InputRange:
    """Per-tensor range of the transformed input u = T_g(x): one for all timesteps, or one a group of `boundaries`."""
    tokens = InputSample(site.tokens, timesteps).transformed(chain)
    low, high = _extremes(site, timesteps, chain, tokens)
    range_group = group_of(timesteps, boundaries)
    parameters = []
    for g in range(len(boundaries) + 1):
        steps = range_group == g
        full = low[steps].amin(dim=0, keepdim=True), high[steps].amax(dim=0, keepdim=True)
        if search == "minmax":
            parameters.append(affine.affine_parameters(*full, scheme))
        else:
            rows = tokens[steps].flatten(0, 1)  # whole tokens: a stride over values would look at every n-th channel
            rows = rows[:: -(-rows.numel() // _MOST_VALUES)]
            values = rows.reshape(1, -1)
            parameters.append(
                affine.percentile_range(values, scheme)
                if search == "percentile"
                else affine.search_range(values, *full, scheme)
            )
    scale, zero_point = (torch.cat(parts) for parts in zip(*parameters, strict=True))
    return InputRange(scale, zero_point, boundaries)


def _extremes(site: SiteStatistics, timesteps: Tensor, chain: Chain, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of u at each step, [S] each: of every token, or after a rotation of the sample.

    Extremes of channels say nothing of their sums. tokens: [S, R, K], the sample of u.
    """
    if chain.rotation is not None:
        return tokens.amin(dim=(1, 2)), tokens.amax(dim=(1, 2))
    group = group_of(timesteps, chain.boundaries)
    return chain.forward(site.minimum, group).amin(dim=1), chain.forward(site.maximum, group).amax(dim=1)
