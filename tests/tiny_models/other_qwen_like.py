# SPDX-License-Identifier: Apache-2.0
"""Descendants of Qwen-Image and their relatives: Qwen-Image 2.1, Nucleus-MoE-Image, JoyImage-Edit."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_FRACTIONS = (0.95, 0.5, 0.02)


def _qwen21(timestep: float, generator: torch.Generator) -> Inputs:
    """Five tokens of text, then a slot that stands for 2 x 2 latent tokens, four times."""
    return dict(
        hidden_states=torch.randn(1, 16, 16, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        timestep=torch.tensor([timestep]),
        img_shapes=[[(1, 4, 4)]],
        img_mask=torch.tensor([[False] * 5 + [True] * 4]),
    )


_QWEN21 = dict(
    in_channels=16,
    out_channels=16,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    context_in_dim=32,
    axes_dims_rope=(4, 6, 6),
)
add(TinyModel("QwenImage21Transformer2DModel", _QWEN21, _qwen21, _FRACTIONS))


def _nucleus(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 16, 16, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.long),
        timestep=torch.tensor([timestep]),
        img_shapes=[(1, 4, 4)],
    )


_NUCLEUS = dict(
    in_channels=16,
    out_channels=4,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=4,  # of narrower ones the feed-forward's width would be rounded down to nothing
    joint_attention_dim=32,
    axes_dims_rope=(8, 4, 4),
    capacity_factors=[2.0, 2.0],
)
add(TinyModel("NucleusMoEImageTransformer2DModel", dict(_NUCLEUS, moe_enabled=False), _nucleus, _FRACTIONS, "dense"))
add(
    TinyModel(
        "NucleusMoEImageTransformer2DModel",
        dict(_NUCLEUS, num_experts=4, moe_intermediate_dim=32, dense_moe_strategy="leave_first_block_dense"),
        _nucleus,
        _FRACTIONS,
        unset=("experts.gate_up_proj", "experts.down_proj"),
    )
)


def _joy(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 16, 1, 4, 4, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        timestep=torch.tensor([timestep]),
    )


def _joy_plus(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 4, 16, 1, 2, 2, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        timestep=torch.tensor([timestep]),
        shape_list=[[(1, 1, 2), (1, 2, 1)]],
    )


_JOY = dict(
    patch_size=[1, 2, 2],
    in_channels=16,
    hidden_size=32,
    num_attention_heads=2,
    text_dim=32,
    num_layers=2,
    rope_dim_list=[4, 6, 6],
)
add(TinyModel("JoyImageEditTransformer3DModel", _JOY, _joy))
add(TinyModel("JoyImageEditPlusTransformer3DModel", _JOY, _joy_plus))
