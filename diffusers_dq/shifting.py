# SPDX-License-Identifier: Apache-2.0
"""Shifts of channels that differ by timestep group (HTG, arXiv 2503.06930, Eq. 2 to 4).   S steps, G groups."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from diffusers_dq.timesteps import Boundaries, Linkage, boundaries_of, group_of, partition


def midpoints(minimum: Tensor, maximum: Tensor) -> Tensor:
    """z_t = (max X_t + min X_t) / 2, [S, K]   (Eq. 2)."""
    return (maximum + minimum) / 2


def group_steps(
    shifts: Mapping[str, Tensor],
    timesteps: Tensor,
    groups: int | None,
    linkage: Linkage,
    scope: Literal["model", "layer"],
) -> dict[str, Boundaries]:
    """Eq. 3 for each site, or once for all sites side by side, each in units of its own spread.

    shifts: z_t [S, K] by site.   timesteps: [S].   groups: G; None is the paper's floor(S / 10), at least 1.
    """
    ascending, order = timesteps.sort()
    groups = groups or max(1, len(timesteps) // 10)

    def cut(z: Tensor) -> Boundaries:
        return boundaries_of(ascending, partition(z[order], groups, linkage))

    if scope == "layer":
        return {name: cut(z) for name, z in shifts.items()}
    if not shifts:
        return {}
    return dict.fromkeys(shifts, cut(torch.cat([_normalized(z) for z in shifts.values()], dim=1)))


def group_means(z: Tensor, timesteps: Tensor, boundaries: Boundaries) -> Tensor:
    """z-bar_g, the mean of z [S, K] over the steps of each group, [G, K]   (Eq. 4)."""
    group = group_of(timesteps, boundaries)
    return torch.stack([z[group == g].mean(0) for g in range(len(boundaries) + 1)])


def _normalized(z: Tensor) -> Tensor:
    """In units of the site's own variation over the steps, so that no layer outvotes the rest by its units."""
    spread = (z - z.mean(0)).square().mean().sqrt()
    return z / spread.clamp(min=torch.finfo(z.dtype).tiny) if spread > 0 else torch.zeros_like(z)
