# SPDX-License-Identifier: Apache-2.0
"""What is particular to transformers of video: steps a frame, contexts in tuples, layers called alike."""

import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler
from support import rebuilt_with_chains
from tiny_models import MODELS

import diffusers_dq as dq
from diffusers_dq.installation import BOUNDARIES, GROUPS
from diffusers_dq.modulation import Modulation, ModulationLayout
from diffusers_dq.specs import spec_of
from diffusers_dq.text_cache import cache_text
from diffusers_dq.timesteps import TimestepGroups
from diffusers_dq.transforms import Chain, Shift

NEW = torch.Generator().manual_seed


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 5, 4), (2, 12)], ids=str)
def test_a_modulation_whose_chunks_lie_before_the_tokens(shape):
    modulation = Modulation(ModulationLayout(argument="y", channels=12, offset_groups=1, axis=1), TimestepGroups())
    modulation.multiplier.copy_(torch.arange(1.0, 13))
    modulation.offset.copy_(torch.arange(12.0)[None])
    y = torch.randn(shape, generator=NEW(0))
    table = torch.arange(12.0) if len(shape) == 2 else torch.arange(12.0).view(3, *[1] * (len(shape) - 3), 4)
    torch.testing.assert_close(modulation(y), y * (table + 1) + table)  # one rounding less: a fused multiply-add


@pytest.mark.parametrize("name", ["WanTransformer3DModel-step_per_token", "SkyReelsV2Transformer3DModel-forced"])
def test_the_noisiest_token_decides_the_group(name):
    """Some frames are at step 0 or half way in every forward: the group follows the largest."""
    tiny = MODELS[name]
    model = tiny.build(torch.float64)
    group = next(group for group in spec_of(model).groups if group.producer is not None)
    shift = torch.randn(3, model.get_submodule(group.name).in_features, generator=NEW(0), dtype=torch.float64)
    twin = rebuilt_with_chains(model, {group.name: Chain((Shift(shift),), (200.0, 800.0))})
    partition = getattr(twin, BOUNDARIES).tolist().index([200.0, 800.0])
    for timestep, expected in zip(tiny.timesteps, (2, 1, 0), strict=True):
        tiny.run(twin, timestep)
        assert getattr(twin, GROUPS).index[partition] == expected


def test_diffusion_forcing_is_the_same_after_saving(tmp_path):
    tiny = MODELS["SkyReelsV2Transformer3DModel-forced"]
    model, absent = tiny.build(), dict.fromkeys(["tokenizer", "text_encoder", "vae"])
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    pipe = SkyReelsV2DiffusionForcingPipeline(scheduler=scheduler, transformer=model, **absent)
    text = torch.randn(1, 5, 32, generator=NEW(0))
    size = dict(height=32, width=32, num_frames=5, base_num_frames=5)
    call = dict(prompt=None, prompt_embeds=text, negative_prompt_embeds=torch.zeros(1, 5, 32), ar_step=0, **size)
    full = tiny.run(model)
    dq.quantize(pipe, dq.DQConfig("htg", groups=3), calls=[call], num_inference_steps=5, progress=False)
    expected = tiny.run(model)
    assert any(isinstance(module, Modulation) for module in model.modules())
    assert 0 < (expected - full).norm() <= 0.1 * full.norm()  # 8 bits through two blocks
    model.save_pretrained(tmp_path)
    again = SkyReelsV2Transformer3DModel.from_pretrained(tmp_path).eval()
    assert torch.equal(tiny.run(again), expected)


@torch.no_grad()
def test_a_tuple_of_contexts_is_known_again():
    tiny = MODELS["CosmosTransformer3DModel-picture"]
    model = tiny.build()
    inputs = [dict(tiny.inputs(timestep, NEW(2))) for timestep in tiny.timesteps]
    for step in inputs:
        step["encoder_hidden_states"] = tuple(inputs[0]["encoder_hidden_states"])  # pipelines make one each step
    expected = [model(**step).sample for step in inputs]
    calls = []
    text = spec_of(model).text
    for name in text.linears:
        linear = model.get_submodule(name)
        linear.forward = lambda x, forward=linear.forward: calls.append(forward) or forward(x)
    with cache_text(model):
        found = [model(**step).sample for step in inputs]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert len(calls) == len(text.linears)


@pytest.mark.parametrize(
    "name, blocks",
    [("HunyuanVideoTransformer3DModel", "single_transformer_blocks"), ("WanVACETransformer3DModel", "vace_blocks")],
)
def test_the_last_projection_stays_and_those_of_blocks_do_not(name, blocks):
    report = dq.quantize(MODELS[name].build(), dq.DQConfig("rtn"), progress=False)
    quantized = [linear.name for linear in report.quantized]
    assert f"{blocks}.1.proj_out" in quantized and "proj_out" not in quantized


@pytest.mark.parametrize("name", ["HunyuanVideoTransformer3DModel-token_replace", "CogVideoXTransformer3DModel"])
def test_modulation_linears_are_rounded_as_weights_only(name):
    model = MODELS[name].build()
    dq.quantize(model, dq.DQConfig("rtn"), progress=False)
    for linear in spec_of(model).weight_only:
        layout = model.get_submodule(linear).layout
        assert (layout.weight_bits, layout.activation_bits) == (8, 16)
