# SPDX-License-Identifier: Apache-2.0
"""Small models for tests, and the transforms of a model put in place by hand."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from diffusers_dq.config import DQConfig
from diffusers_dq.conversion import Conversion
from diffusers_dq.methods import Method, Solution
from diffusers_dq.methods.base import MethodOptions
from diffusers_dq.transforms import Chain


def tiny_dit(seed: int = 0, **changes: Any) -> DiTTransformer2DModel:
    """Two blocks of width 32 over 16 tokens, 20 classes, weights random and adaLN weights not zero."""
    settings: dict[str, Any] = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    torch.manual_seed(seed)
    return DiTTransformer2DModel(**{**settings, **changes}).eval()


def tiny_pipeline(seed: int = 0, **changes: Any) -> DiTPipeline:
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
    ).eval()
    pipe = DiTPipeline(tiny_dit(seed, **changes), vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pixart() -> PixArtTransformer2DModel:
    """Two blocks of width 32 over 16 tokens, 5 tokens of text of width 32."""
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=32,
        use_additional_conditions=False,
    ).eval()


def tiny_pixart_pipeline() -> PixArtSigmaPipeline:
    """Without a text encoder: `PIXART_CALL` brings the prompt's embedding."""
    pipe = PixArtSigmaPipeline(None, None, tiny_pipeline().vae, tiny_pixart(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIXART_CALL: dict[str, Any] = dict(
    prompt_embeds=torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)),
    prompt_attention_mask=torch.ones(1, 5),
    negative_prompt=None,
    negative_prompt_embeds=torch.zeros(1, 5, 32),
    negative_prompt_attention_mask=torch.ones(1, 5),
    height=16,
    width=16,
    use_resolution_binning=False,
)


def assert_close(output: torch.Tensor, expected: torch.Tensor, flips: float = 2e-3) -> None:
    """Equal but for fp32 sums in another order, after which a few roundings to integers go the other way."""
    assert (output - expected).norm() <= flips * expected.norm()


CALLS = [dict(class_labels=[1, 2], guidance_scale=1.5), dict(class_labels=[3, 4], guidance_scale=1.5)]


def rebuilt_with_chains(model: torch.nn.Module, chains: Mapping[str, Chain], **config: Any) -> torch.nn.Module:
    """A copy of the model with these transforms by site name, placed as the planner does; 16 / 16 bits by default."""
    twin = deepcopy(model)
    bits = {"weight_bits": 16, "activation_bits": 16, **config}
    conversion = Conversion(twin, DQConfig("rtn", **bits), None, next(model.parameters()).dtype, method=Fixed(chains))
    conversion.build_all(progress=False)
    conversion.finish()
    return twin


class Fixed(Method):
    """A method whose solution is given."""

    def __init__(self, chains: Mapping[str, Chain]) -> None:
        super().__init__(MethodOptions())
        self.chains = chains

    needs_statistics = False

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> Any:
        raise NotImplementedError

    def solve(self, sites: Any, timesteps: Any) -> Solution:
        return Solution(self.chains)
