# SPDX-License-Identifier: Apache-2.0
"""Sound: ACE-Step, LongCat-Audio, MiniMax Music 3, Stable Audio 1 and 3."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_FRACTIONS = (0.95, 0.5, 0.02)


def _ace(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 8, 8, generator=generator),
        timestep=torch.tensor([timestep]),
        timestep_r=torch.tensor([timestep]),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        context_latents=torch.randn(1, 8, 16, generator=generator),
    )


add(
    TinyModel(
        "AceStepTransformer1DModel",
        dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            in_channels=24,
            audio_acoustic_hidden_dim=8,
            patch_size=2,
            sliding_window=4,
        ),
        _ace,
        _FRACTIONS,
    )
)


def _longcat(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 8, 16, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        encoder_attention_mask=torch.tensor([[True, True, True, True, False]]),
        timestep=torch.tensor([timestep]),
        attention_mask=torch.ones(1, 8, dtype=torch.bool),
    )


add(
    TinyModel(
        "LongCatAudioDiTTransformer",
        dict(dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=32, latent_dim=16, text_conv=False),
        _longcat,
        (0.02, 0.5, 0.95),
    )
)


def _music(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 16, 8, generator=generator),
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=torch.randn(1, 8, 16, generator=generator),
    )


add(
    TinyModel(
        "MiniMaxMusic3Transformer1DModel",
        dict(
            in_channels=16,
            condition_dim=16,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            ff_inner_dim=64,
            rotary_dim=8,
            fourier_embedding_dim=16,
        ),
        _music,
        (0.02, 0.5, 0.95),
    )
)


def _stable(timestep: float, generator: torch.Generator) -> Inputs:
    angles = torch.rand(9, 8, generator=generator)
    return dict(
        hidden_states=torch.randn(2, 4, 8, generator=generator),
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        global_hidden_states=torch.randn(2, 1, 16, generator=generator),
        rotary_embedding=(angles.cos(), angles.sin()),
    )


add(
    TinyModel(
        "StableAudioDiTModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            cross_attention_dim=16,
            time_proj_dim=16,
            global_states_input_dim=16,
            cross_attention_input_dim=32,
        ),
        _stable,
        (0.99, 0.5, 0.02),
    )
)


def _stable3(timestep: float, generator: torch.Generator) -> Inputs:
    return dict(
        hidden_states=torch.randn(1, 4, 8, generator=generator),
        timestep=torch.tensor([timestep]),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        global_hidden_states=torch.randn(1, 16, generator=generator),
        local_add_cond=torch.randn(1, 5, 8, generator=generator),
    )


add(
    TinyModel(
        "StableAudio3DiTModel",
        dict(
            io_channels=4,
            embed_dim=32,
            depth=2,
            num_heads=2,
            cond_token_dim=32,
            global_cond_dim=16,
            local_add_cond_dim=5,
            timestep_features_dim=16,
            ff_mult=2.0,
            num_memory_tokens=2,
        ),
        _stable3,
        _FRACTIONS,
    )
)
