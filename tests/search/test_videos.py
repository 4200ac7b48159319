# SPDX-License-Identifier: Apache-2.0
"""Nothing of a search is of pictures alone: Latte, whose temporal attention is in blocks of its own."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel

import diffusers_dq as dq
from diffusers_dq import search
from diffusers_dq.costs import Choice
from diffusers_dq.search.sensitivity import from_outputs
from diffusers_dq.search.trial import Trial, layers_of

CALL = dict(
    prompt_embeds=torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)),
    negative_prompt=None,
    negative_prompt_embeds=torch.zeros(1, 5, 32),
    height=8,
    width=8,
    video_length=3,
    output_type="latent",
    clean_caption=False,
)
CONFIG = dq.DQConfig("rtn", 4, 8)


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        caption_channels=32,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=3,
        attention_bias=True,
    ).eval()
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    return LattePipeline(None, None, vae, transformer, DDIMScheduler())


@pytest.fixture(scope="module")
def statistics(pipe):
    return dq.calibrate(pipe, [CALL], num_inference_steps=3, samples=3, progress=False)


def test_each_kind_of_layer_has_its_metric(pipe, statistics):
    names = [layer.name for layer in layers_of(pipe.transformer, CONFIG, statistics)]
    trial = Trial(pipe.transformer, CONFIG, statistics, {name: [Choice(4, 8), Choice(8, 8)] for name in names})
    found = from_outputs(trial, trial.choices, statistics)
    for name, group in found.groups.items():
        kinds = ("temporal_" in name, ".attn2." in name)
        assert group == {(1, 0): "temporal consistency", (0, 1): "text alignment"}.get(kinds, "visual quality")
        assert found.own[name][0] > found.own[name][1] > 0
    assert set(found.groups.values()) == {"temporal consistency", "text alignment", "visual quality"}


@pytest.mark.parametrize("mode", ["joint", "decoupled"])
def test_bits_are_allocated_to_all_kinds(pipe, statistics, mode):
    config = dq.allocate_bits(pipe, CONFIG, statistics, budget=7.0, mode=mode, progress=False)
    dq.quantize(LatteTransformer3DModel.from_config(pipe.transformer.config), config, progress=False)
    assert {override["weight_bits"] for override in config.overrides.values()} == {4, 8}


def test_group_sizes_are_searched(pipe, statistics):
    config = search.search_group_sizes(
        pipe,
        dq.DQConfig("qdit", 4, 8),
        [CALL],
        num_inference_steps=3,
        statistics=statistics,
        limit=search.BitOpsOf(64),
        population=4,
        generations=1,
        progress=False,
    )
    assert any("temporal_" in name for name in config.overrides)
