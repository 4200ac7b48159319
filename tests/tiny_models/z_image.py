# SPDX-License-Identifier: Apache-2.0
"""Z-Image: lists of samples; "omni" with a clean reference image and its SigLIP features before each noisy one."""

from typing import Any

import torch
from torch import Tensor

from tiny_models.base import Inputs, TinyModel, add

_SETTINGS: dict[str, Any] = dict(
    in_channels=16,
    dim=48,
    n_layers=2,
    n_refiner_layers=2,
    n_heads=3,
    n_kv_heads=3,
    cap_feat_dim=32,
    axes_dims=[4, 6, 6],
    axes_lens=[128, 16, 16],
)


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        x=[torch.randn(16, 1, 8, 8, generator=generator) for _ in range(2)],
        t=torch.tensor([timestep, timestep]),
        cap_feats=[torch.randn(length, 32, generator=generator) for length in (5, 35)],  # one of 32 tokens, one of 64
    )


def _omni(timestep: float, generator: torch.Generator) -> Inputs:
    def pairs(*shapes: tuple[int, ...]) -> list[list[Tensor]]:
        return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]

    return dict(
        x=pairs((16, 1, 8, 8), (16, 1, 8, 8)),
        t=torch.tensor([timestep, timestep]),
        cap_feats=pairs((5, 32), (7, 32), (3, 32)),
        siglip_feats=[[features, None] for (features,) in pairs((2, 2, 16))],
        image_noise_mask=[[0, 1], [0, 1]],
    )


add(TinyModel("ZImageTransformer2DModel", _SETTINGS, _inputs, timesteps=(0.0, 0.5, 0.97)))
add(
    TinyModel(
        "ZImageTransformer2DModel",
        dict(**_SETTINGS, siglip_feat_dim=16),
        _omni,
        timesteps=(0.0, 0.5, 0.97),
        variant="omni",
    )
)
