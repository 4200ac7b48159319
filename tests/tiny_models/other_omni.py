# SPDX-License-Identifier: Apache-2.0
"""Several modalities in one packed sequence, each with noise of its own: Cosmos 3, MiniMax H3, RFD4-Proteina."""

import torch

from tiny_models.base import Inputs, TinyModel, add

_FRACTIONS = (0.95, 0.5, 0.02)


def _cosmos(timestep: float, generator: torch.Generator) -> Inputs:
    """Three tokens of text, then a picture of 2 by 2."""
    picture = torch.arange(3, 7)
    return dict(
        input_ids=torch.tensor([1, 2, 3]),
        text_indexes=torch.arange(3),
        position_ids=torch.arange(7).expand(3, 7),
        und_len=3,
        sequence_length=7,
        vision_tokens=[torch.randn(1, 4, 1, 2, 2, generator=generator)],
        vision_token_shapes=[(1, 2, 2)],
        vision_sequence_indexes=picture,
        vision_mse_loss_indexes=picture,
        vision_timesteps=torch.full((4,), timestep),
        vision_noisy_frame_indexes=[torch.tensor([0])],
    )


add(
    TinyModel(
        "Cosmos3OmniTransformer",
        dict(
            head_dim=16,
            hidden_size=32,
            intermediate_size=64,
            latent_channel=4,
            latent_patch_size=1,
            num_attention_heads=2,
            num_hidden_layers=2,
            num_key_value_heads=1,
            patch_latent_dim=4,
            rope_axes_dim=[4, 2, 2],
            vocab_size=32,
        ),
        _cosmos,
    )
)


def _minimax(timestep: float, generator: torch.Generator) -> Inputs:
    """Two tokens of text, three of sound on a schedule of its own, four of video."""
    text, sound, video = torch.arange(2), torch.arange(2, 5), torch.arange(5, 9)
    return dict(
        hidden_states=torch.randn(1, 4, 16, generator=generator),
        audio_hidden_states=torch.randn(1, 3, 16, generator=generator),
        encoder_hidden_states=torch.randn(1, 2, 32, generator=generator),
        timestep=torch.tensor([timestep, timestep / 2]),
        timestep_indices=torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 0]),
        token_tags=torch.tensor([1, 1, 2, 2, 2, 0, 0, 0, 0]),
        position_ids=torch.arange(9.0)[:, None].expand(9, 3),
        video_indices=video,
        audio_indices=sound,
        text_indices=text,
    )


add(
    TinyModel(
        "MiniMaxH3Transformer3DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=16,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            ffn_dim=64,
            in_channels=4,
            audio_in_channels=16,
            text_dim=32,
            freq_dim=16,
            time_embed_hidden_dim=32,
            time_embed_dim=16,
            rope_freq_dim=2,
        ),
        _minimax,
        _FRACTIONS,
    )
)


def _protein(timestep: float, generator: torch.Generator) -> Inputs:
    """Four residues. The backbone and the latents each have a time, 0 where there is only noise."""
    return dict(
        bb_ca=torch.randn(1, 4, 3, generator=generator),
        local_latents=torch.randn(1, 4, 16, generator=generator),
        bb_ca_time=torch.tensor([timestep]),
        local_latents_time=torch.tensor([timestep]),
        padding_mask=torch.ones(1, 4, dtype=torch.bool),
        token_type=torch.zeros(1, 4, dtype=torch.long),
        atom37_mask=torch.ones(1, 4, 37, dtype=torch.bool),
        conditioning=dict(
            is_in_context_conditioning=torch.zeros(1, 4, dtype=torch.bool),
            supports_local_latent=torch.ones(1, 4, dtype=torch.bool),
        ),
        recycle_depth=2,
    )


add(
    TinyModel(
        "RFD4ProteinaTransformer",
        dict(
            nlayers=2,
            token_dim=32,
            nheads=2,
            dim_cond=16,
            pair_repr_dim=32,
            latent_dim=16,
            token_type_emb_dim=16,
            cath_emb_dim=16,
            t_emb_dim=16,
            seq_sep_dim=16,
            xt_pair_dist_dim=16,
            feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
            feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
            feats_pair_repr=("xt_bb_ca_pair_dists",),
            tri_mult_c=16,
            num_sequence_classes=16,
        ),
        _protein,
        (0.02, 0.5, 0.95),
    )
)
