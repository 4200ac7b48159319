# SPDX-License-Identifier: Apache-2.0
"""The transformers of the step benchmark: published sizes, random weights, made on the device."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    LatteTransformer3DModel,
    ModelMixin,
    PixArtTransformer2DModel,
)
from torch import Tensor

Inputs = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and the call of one denoising step.

    layers: blocks; of FLUX, double blocks, with twice as many single ones; of Latte, a spatial and a temporal each.
    tokens: of a picture, or of a frame.   text: tokens of the prompt.   cfg: guidance, which doubles the batch.
    """

    name: str
    title: str
    family: str
    layers: int
    heads: int
    head_dim: int
    tokens: int
    batch: int
    frames: int = 1
    text: int = 0
    text_width: int = 4096
    cfg: bool = True

    def __post_init__(self) -> None:
        if math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"tokens must be a square number, as of a square picture, got {self.tokens}")
        for field in ("layers", "heads", "head_dim", "tokens", "batch", "frames"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")

    @property
    def samples(self) -> int:
        return self.batch * (2 if self.cfg else 1)

    @property
    def side(self) -> int:
        """Of the latent: each token is a patch of 2 x 2."""
        return 2 * math.isqrt(self.tokens)

    def changed(self, **changes: Any) -> "Case":
        """With what is not None."""
        return replace(self, **{key: value for key, value in changes.items() if value is not None})

    def describe(self) -> dict[str, Any]:
        return asdict(self)


_XL: dict[str, Any] = dict(layers=28, heads=16, head_dim=72)
CASES = {
    case.name: case
    for case in (
        Case(name="dit-512", title="DiT-XL/2 512", family="dit", tokens=1024, batch=16, **_XL),
        Case(name="dit-256", title="DiT-XL/2 256", family="dit", tokens=256, batch=16, **_XL),
        Case(name="pixart", title="PixArt-Sigma 1024", family="pixart", tokens=4096, batch=2, text=300, **_XL),
        Case(
            name="stdit",
            title="STDiT 16x512x512 (stand-in: LatteTransformer3DModel of its width and depth)",
            family="latte",
            tokens=1024,
            frames=16,
            batch=1,
            text=120,
            **_XL,
        ),
        Case(
            name="flux",
            title="FLUX.1 1024",
            family="flux",
            layers=19,
            heads=24,
            head_dim=128,
            tokens=4096,
            batch=1,
            text=512,
            cfg=False,
        ),
    )
}


def case_of(name: str) -> Case:
    if name not in CASES:
        raise ValueError(f"no benchmark model {name!r}; known: {', '.join(CASES)}")
    return CASES[name]


def build(case: Case, device: str, seed: int = 0) -> ModelMixin:
    """In fp32, for inference, each weight random and none zero."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = _FAMILIES[case.family][0](case).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def inputs(case: Case, device: str, dtype: torch.dtype, seed: int = 1) -> Inputs:
    """Of one call of the transformer in the middle of denoising, the same for every contestant."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return _FAMILIES[case.family][1](case, normal, device)


Normal = Callable[..., Tensor]


def _dit(case: Case) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=case.heads,
        attention_head_dim=case.head_dim,
        num_layers=case.layers,
        sample_size=case.side,
        out_channels=8,
    )


def _dit_inputs(case: Case, normal: Normal, device: str) -> Inputs:
    labels = torch.arange(case.samples, device=device) % 1000
    if case.cfg:
        labels[case.batch :] = 1000  # the class of no class
    return {
        "hidden_states": normal(case.samples, 4, case.side, case.side),
        "timestep": torch.full((case.samples,), 500, device=device),
        "class_labels": labels,
    }


def _pixart(case: Case) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=case.heads,
        attention_head_dim=case.head_dim,
        num_layers=case.layers,
        cross_attention_dim=case.heads * case.head_dim,
        sample_size=case.side,
        interpolation_scale=max(case.side // 64, 1),
        use_additional_conditions=False,
        caption_channels=case.text_width,
    )


def _pixart_inputs(case: Case, normal: Normal, device: str) -> Inputs:
    return {
        "hidden_states": normal(case.samples, 4, case.side, case.side),
        "encoder_hidden_states": normal(case.samples, case.text, case.text_width),
        "encoder_attention_mask": torch.ones(case.samples, case.text, device=device),
        "timestep": torch.full((case.samples,), 500, device=device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _latte(case: Case) -> LatteTransformer3DModel:
    return LatteTransformer3DModel(
        num_attention_heads=case.heads,
        attention_head_dim=case.head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=case.layers,
        cross_attention_dim=case.heads * case.head_dim,
        attention_bias=True,
        sample_size=case.side,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=case.text_width,
        video_length=case.frames,
    )


def _latte_inputs(case: Case, normal: Normal, device: str) -> Inputs:
    return {
        "hidden_states": normal(case.samples, 4, case.frames, case.side, case.side),
        "timestep": torch.full((case.samples,), 500, device=device),
        "encoder_hidden_states": normal(case.samples, case.text, case.text_width),
    }


def _flux(case: Case) -> FluxTransformer2DModel:
    eighth = case.head_dim // 8
    rest = (case.head_dim - eighth) // 2
    return FluxTransformer2DModel(
        num_layers=case.layers,
        num_single_layers=2 * case.layers,
        attention_head_dim=case.head_dim,
        num_attention_heads=case.heads,
        joint_attention_dim=case.text_width,
        guidance_embeds=True,
        axes_dims_rope=(eighth, rest, rest),
    )


def _flux_inputs(case: Case, normal: Normal, device: str) -> Inputs:
    side = math.isqrt(case.tokens)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    picture = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    hidden = normal(case.samples, case.tokens, 64)
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": normal(case.samples, case.text, case.text_width),
        "pooled_projections": normal(case.samples, 768),
        "timestep": torch.full((case.samples,), 0.5, device=device, dtype=hidden.dtype),
        "guidance": torch.full((case.samples,), 3.5, device=device, dtype=hidden.dtype),
        "img_ids": picture.to(device, hidden.dtype),
        "txt_ids": torch.zeros(case.text, 3, device=device, dtype=hidden.dtype),
    }


_FAMILIES: dict[str, tuple[Callable[[Case], ModelMixin], Callable[[Case, Normal, str], Inputs]]] = {
    "dit": (_dit, _dit_inputs),
    "pixart": (_pixart, _pixart_inputs),
    "latte": (_latte, _latte_inputs),
    "flux": (_flux, _flux_inputs),
}
