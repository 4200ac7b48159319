# SPDX-License-Identifier: Apache-2.0
"""Kandinsky 5 and 6: a modulation linear in every block, text encoded by blocks of its own."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_WIDTHS = dict(time_dim=16, model_dim=32, ff_dim=64, num_visual_blocks=2)
_TEXT = dict(in_text_dim=32, in_text_dim2=16, num_text_blocks=1)


def _text(generator: torch.Generator) -> Inputs:
    return dict(
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        pooled_projections=torch.randn(1, 16, generator=generator),
    )


def _five(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        _text(generator),
        hidden_states=torch.randn(1, 2, 4, 4, 4, generator=generator),
        timestep=torch.tensor([timestep]),
        visual_rope_pos=[torch.arange(2), torch.arange(2), torch.arange(2)],
        text_rope_pos=torch.arange(5),
    )


def _six(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        _text(generator),
        hidden_states=torch.randn(1, 2, 4, 4, 9, generator=generator),
        audio_hidden_states=torch.randn(1, 3, 16, generator=generator),
        timestep=torch.tensor([timestep]),
    )


def _super_resolution(timestep: float, generator: torch.Generator) -> Inputs:
    """One tile of 8 by 8 tokens: the smallest that its sparse attention takes."""
    return dict(hidden_states=torch.randn(1, 1, 8, 8, 9, generator=generator), timestep=torch.tensor([timestep]))


_FIVE = dict(_WIDTHS, **_TEXT, in_visual_dim=4, out_visual_dim=4, axes_dims=(4, 4, 8))
_SIX = dict(_FIVE, in_audio_dim=16, out_audio_dim=16, ca_rope=True, cross_gates=True, fix_modulation=True)
_SR = dict(_WIDTHS, in_visual_dim=4, out_visual_dim=4, axes_dims=(4, 4, 8), nabla_window=(1, 1, 1))
add(TinyModel("Kandinsky5Transformer3DModel", _FIVE, _five))
add(TinyModel("Kandinsky6Transformer3DModel", _SIX, _six))
add(TinyModel("Kandinsky6SRTransformer3DModel", _SR, _super_resolution))
