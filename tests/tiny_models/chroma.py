# SPDX-License-Identifier: Apache-2.0
import torch

from tiny_models.base import Inputs, TinyModel, add


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    mask = torch.ones(2, 5 + 16, dtype=torch.bool)
    mask[1, 3:5] = False
    return dict(
        hidden_states=torch.randn(2, 16, 16, generator=generator),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        timestep=torch.tensor([timestep, timestep]),
        img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        txt_ids=torch.zeros(5, 3),
        attention_mask=mask,
    )


add(
    TinyModel(
        "ChromaTransformer2DModel",
        dict(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=32,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        _inputs,
        (0.951, 0.499, 0.021),
    )
)
