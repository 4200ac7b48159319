# SPDX-License-Identifier: Apache-2.0
"""Text and image in one stream, or text by cross-attention only: FIBO 2, ERNIE-Image, Ideogram 4, Krea 2, Lumina-Next,
OmniGen, PRX."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_FRACTIONS = (0.95, 0.5, 0.02)


def _fibo2(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 4, 8, 8, generator=generator),
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=torch.randn(1, 2, 6, 32, generator=generator),
    )


add(
    TinyModel(
        "BriaFibo2Transformer2DModel",
        dict(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=32,
            injection_layer_ids=(1,),
            perceiver_num_layers=1,
            min_num_gist_tokens=2,
            max_num_gist_tokens=4,
            gist_step=1,
            gist_min_text_len=2,
            gist_max_text_len=8,
            axes_dims=(4, 4, 8),
            axes_lens=(16, 16, 16),
        ),
        _fibo2,
        _FRACTIONS,
    )
)


def _ernie(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 16, 4, 4, generator=generator),
        timestep=torch.tensor([timestep]),
        text_bth=torch.randn(1, 5, 16, generator=generator),
        text_lens=torch.tensor([5]),
    )


add(
    TinyModel(
        "ErnieImageTransformer2DModel",
        dict(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=64,
            in_channels=16,
            out_channels=16,
            patch_size=1,
            text_in_dim=16,
            rope_axes_dim=(8, 4, 4),
        ),
        _ernie,
    )
)


def _ideogram(timestep: float, generator: torch.Generator) -> Inputs:
    """Six tokens of text, four of an image, told apart by the indicator."""
    from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR

    is_image = torch.arange(10) >= 6
    grid = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]) + 100
    return dict(
        hidden_states=torch.randn(1, 10, 16, generator=generator) * is_image[:, None],
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=torch.randn(1, 10, 32, generator=generator) * ~is_image[:, None],
        position_ids=torch.cat([torch.arange(6)[:, None].expand(6, 3), grid])[None],
        segment_ids=torch.ones(1, 10, dtype=torch.long),
        indicator=torch.where(is_image, OUTPUT_IMAGE_INDICATOR, LLM_TOKEN_INDICATOR)[None],
    )


add(
    TinyModel(
        "Ideogram4Transformer2DModel",
        dict(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=64,
            adaln_dim=16,
            llm_features_dim=32,
            rope_theta=10000,
            mrope_section=(4, 2, 2),
        ),
        _ideogram,
        (0.02, 0.5, 0.95),
    )
)


def _krea(timestep: float, generator: torch.Generator) -> Inputs:
    grid = torch.cartesian_prod(torch.tensor([0.0]), torch.arange(4.0), torch.arange(4.0))
    return dict(
        hidden_states=torch.randn(1, 16, 16, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 3, 32, generator=generator),
        timestep=torch.tensor([timestep]),
        position_ids=torch.cat([torch.zeros(5, 3), grid]),
        encoder_attention_mask=torch.tensor([[True, True, True, True, False]]),
    )


add(
    TinyModel(
        "Krea2Transformer2DModel",
        dict(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            timestep_embed_dim=16,
            text_hidden_dim=32,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(8, 4, 4),
        ),
        _krea,
        _FRACTIONS,
    )
)


def _lumina(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 4, 8, 8, generator=generator),
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        encoder_mask=torch.tensor([[1, 1, 1, 1, 0]]),
        image_rotary_emb=torch.polar(torch.ones(384, 384, 8), torch.rand(384, 384, 8, generator=generator)),
        cross_attention_kwargs={},
    )


add(
    TinyModel(
        "LuminaNextDiT2DModel",
        dict(
            sample_size=8,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            learn_sigma=False,
            cross_attention_dim=32,
        ),
        _lumina,
        (0.02, 0.5, 0.95),
        unset=("pad_token",),
    )
)


def _omnigen(timestep: float, generator: torch.Generator) -> Inputs:
    """Six tokens of text, the timestep, 16 of the picture."""
    return dict(
        hidden_states=torch.randn(1, 4, 8, 8, generator=generator),
        timestep=torch.tensor([timestep]),
        input_ids=torch.arange(6)[None],
        input_img_latents=[],
        input_image_sizes={},
        attention_mask=torch.ones(1, 23, 23),
        position_ids=torch.arange(23)[None],
    )


add(
    TinyModel(
        "OmniGenTransformer2DModel",
        dict(
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            num_layers=2,
            pad_token_id=0,
            vocab_size=32,
            time_step_dim=16,
            rope_scaling=dict(short_factor=[1.0] * 8, long_factor=[1.0] * 8),
        ),
        _omnigen,
        (0.02, 0.5, 0.95),
    )
)


def _prx(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 4, 8, 8, generator=generator),
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
    )


add(
    TinyModel(
        "PRXTransformer2DModel",
        dict(in_channels=4, patch_size=2, context_in_dim=32, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2)
        | dict(axes_dim=[8, 8]),
        _prx,
        _FRACTIONS,
    )
)
