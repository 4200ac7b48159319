# SPDX-License-Identifier: Apache-2.0
"""Text and image in two streams, then in one, as Flux has them: Bria, FIBO, LongCat-Image, Ovis-Image, FLUX.3."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_POSITIONS = dict(
    img_ids=torch.cartesian_prod(torch.tensor([0.0]), torch.arange(4.0), torch.arange(4.0)), txt_ids=torch.zeros(5, 3)
)
_WIDTHS = dict(attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32)
_FRACTIONS = (0.95, 0.5, 0.02)


def _inputs(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 16, 16, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        timestep=torch.tensor([timestep]),
        **_POSITIONS,
    )


def _guided(timestep: float, generator: torch.Generator) -> Inputs:
    return {**_inputs(timestep, generator), "guidance": torch.tensor([3.5])}


def _fibo(timestep: float, generator: torch.Generator) -> Inputs:
    layers = [torch.randn(1, 5, 16, generator=generator) for _ in range(4)]  # one a block
    return {**_inputs(timestep, generator), "text_encoder_layers": layers}


def _flux3(timestep: float, generator: torch.Generator) -> Inputs:
    ids = torch.cartesian_prod(torch.tensor([0.0]), torch.arange(4.0), torch.arange(4.0), torch.tensor([0.0]))
    return {**_inputs(timestep, generator), "img_ids": ids, "txt_ids": torch.zeros(5, 4)}


def _flux3_edit(timestep: float, generator: torch.Generator) -> Inputs:
    reference = torch.randn(1, 4, 16, generator=generator)
    ids = torch.cartesian_prod(torch.tensor([1.0]), torch.arange(2.0), torch.arange(2.0), torch.tensor([0.0]))
    return {**_flux3(timestep, generator), "image_cond_hidden_states": reference, "image_cond_ids": ids}


_FLUX = dict(**_WIDTHS, patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, axes_dims_rope=[4, 4, 8])
_FLUX3 = dict(**_WIDTHS, in_channels=16, cond_in_channels=16, num_layers=2, num_single_layers=2, timestep_channels=16)

add(TinyModel("BriaTransformer2DModel", dict(_FLUX, pooled_projection_dim=None), _inputs))
add(TinyModel("BriaFiboTransformer2DModel", dict(_FLUX, text_encoder_dim=16, pooled_projection_dim=None), _fibo))
add(TinyModel("LongCatImageTransformer2DModel", dict(_FLUX, pooled_projection_dim=32), _guided, _FRACTIONS))
add(TinyModel("OvisImageTransformer2DModel", dict(_FLUX, out_channels=16), _inputs, _FRACTIONS))
add(TinyModel("Flux3Transformer2DModel", dict(_FLUX3, axes_dims_rope=(4, 4, 4, 4)), _flux3, _FRACTIONS))
add(TinyModel("Flux3Transformer2DModel", dict(_FLUX3, axes_dims_rope=(4, 4, 4, 4)), _flux3_edit, _FRACTIONS, "edit"))
