# SPDX-License-Identifier: Apache-2.0
"""Wan 2.2: one transformer for the noisy steps, another for the rest, each with statistics of its own."""

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

import diffusers_dq as dq
from diffusers_dq.linear import QuantizedLinear

PARTS = "transformer", "transformer_2"
STEPS = 6


def build(seed: int = 0) -> WanPipeline:
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    parts = {
        name: WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
        ).eval()
        for name in PARTS
    }
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, vae, scheduler, **parts, boundary_ratio=0.7)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL = dict(
    prompt=None,
    prompt_embeds=torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)),
    negative_prompt_embeds=torch.zeros(1, 6, 32),
    height=16,
    width=16,
    num_frames=5,
    guidance_scale=3.0,
)


@pytest.fixture(scope="module")
def statistics() -> dict[str, dq.Statistics]:
    pipe = build()
    return {
        name: dq.calibrate(pipe, [CALL], num_inference_steps=STEPS, component=name, progress=False) for name in PARTS
    }


def test_each_sees_its_own_steps(statistics):
    noisy, clean = (statistics[name].timesteps for name in PARTS)
    assert len(noisy) + len(clean) == STEPS and noisy.min() > clean.max()


def test_which_one_has_to_be_said(statistics):
    pipe = build()
    for call in (
        lambda: dq.calibrate(pipe, [CALL], num_inference_steps=STEPS, progress=False),
        lambda: dq.quantize(pipe, dq.DQConfig("rtn"), progress=False),
        lambda: dq.inspect(pipe),
    ):
        with pytest.raises(ValueError, match="two denoisers.*component='transformer_2'"):
            call()
    with pytest.raises(ValueError, match="component 'transformer_3' of WanPipeline is none of"):
        dq.inspect(pipe, component="transformer_3")
    with pytest.raises(ValueError, match="component is of a pipeline"):
        dq.inspect(pipe.transformer, component="transformer")


def test_statistics_of_the_other_are_refused(statistics):
    with pytest.raises(ValueError, match="other weights"):
        dq.quantize(build(), dq.DQConfig("htg"), statistics=statistics["transformer"], component="transformer_2")


def test_both_are_quantized_saved_and_loaded(statistics, tmp_path):
    reference, pipe = build(), build()
    for name in PARTS:
        config = dq.DQConfig("htg", groups=2)
        report = dq.quantize(pipe, config, statistics=statistics[name], component=name, progress=False)
        assert len(report.quantized) == 16
    found = {
        name: dq.compare(reference, pipe, [CALL], num_inference_steps=STEPS, component=name, progress=False)
        for name in PARTS
    }
    assert sum(len(c.timesteps) for c in found.values()) == STEPS
    # 8 bits of a model with random weights: noise 20 dB below each layer's output would be 3 bits
    assert all(c.layer_snr and min(snr.min() for snr in c.layer_snr.values()) > 20 for c in found.values())
    expected = pipe(**CALL, num_inference_steps=STEPS, generator=torch.manual_seed(1), output_type="latent").frames
    pipe.save_pretrained(tmp_path)
    again = WanPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    again.set_progress_bar_config(disable=True)
    for name in PARTS:
        assert any(isinstance(module, QuantizedLinear) for module in getattr(again, name).modules())
        assert dq.inspect(tmp_path, component=name).quantized
    output = again(**CALL, num_inference_steps=STEPS, generator=torch.manual_seed(1), output_type="latent").frames
    assert torch.equal(output, expected)


def test_steps_that_never_reach_the_component_are_an_error():
    with pytest.raises(ValueError, match="transformer_2 saw no step of these calls"):
        dq.calibrate(build(), [CALL], num_inference_steps=1, component="transformer_2", progress=False)


def test_searches_take_one_of_them(statistics):
    pipe = build()
    config = dq.DQConfig("rtn", weight_bits=4)
    found = dq.allocate_bits(
        pipe, config, statistics["transformer_2"], budget=5.0, metrics="layers", component="transformer_2"
    )
    assert found.overrides
    found = dq.search_group_sizes(
        pipe,
        dq.DQConfig("qdit", group_size=32, rounding="nearest"),
        [CALL],
        num_inference_steps=STEPS,
        statistics=statistics["transformer_2"],
        sizes=(32, 64),
        population=2,
        parents=1,
        generations=1,
        component="transformer_2",
        progress=False,
    )
    report = dq.quantize(
        pipe, found, statistics=statistics["transformer_2"], component="transformer_2", progress=False
    )
    assert report.quantized and not getattr(pipe.transformer, "is_quantized", False)
