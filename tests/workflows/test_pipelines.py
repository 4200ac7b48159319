# SPDX-License-Identifier: Apache-2.0
"""What else people do to a loaded pipeline, with a quantized transformer in it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DiTPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
)
from peft import LoraConfig, inject_adapter_in_model
from support import CALLS, PIXART_CALL, tiny_pipeline, tiny_pixart_pipeline

import diffusers_dq as dq
from diffusers_dq.linear import QuantizedLinear

CONFIGS = {"rtn": dict(method="rtn", weight_bits=4), "htg": dict(method="htg", groups=3)}


def quantized(pipe: Any, config: str) -> Any:
    call = CALLS[0] if isinstance(pipe, DiTPipeline) else PIXART_CALL
    calls = {} if config == "rtn" else dict(calls=[call], num_inference_steps=4)
    dq.quantize(pipe, dq.DQConfig(**CONFIGS[config]), progress=False, **calls)
    return pipe


def images(pipe: Any) -> torch.Tensor:
    call = CALLS[0] if isinstance(pipe, DiTPipeline) else PIXART_CALL
    seed = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(**call, num_inference_steps=4, generator=seed, output_type="np").images)


@pytest.fixture(params=CONFIGS)
def pixart(request) -> Any:
    return quantized(tiny_pixart_pipeline(), request.param)


@pytest.fixture
def flux(tiny_flux) -> Callable[..., Any]:
    def build(dtype: torch.dtype = torch.float32) -> FluxPipeline:
        pipe = tiny_flux().to(dtype)
        dq.quantize(pipe, dq.DQConfig("rtn"), progress=False)
        return pipe

    return build


# Casting, and pipelines made of others' parts


def test_from_pipe(pixart):
    other = PixArtAlphaPipeline.from_pipe(pixart)
    assert other.transformer is pixart.transformer
    assert torch.equal(images(PixArtSigmaPipeline.from_pipe(other)), images(pixart))


def test_from_pipe_of_a_bf16_pipeline_has_to_be_told(flux):
    pipe = flux(torch.bfloat16)
    with pytest.raises(ValueError, match=r"from_pipe\(pipe, torch_dtype=torch.bfloat16\), which casts to float32"):
        FluxImg2ImgPipeline.from_pipe(pipe)
    other = FluxImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.bfloat16)
    assert other.transformer is pipe.transformer and pipe.transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("reloaded", [False, True])
def test_to_takes_the_dtype_it_has_and_no_other(flux, run_flux, tmp_path, reloaded):
    model = flux(torch.bfloat16).transformer
    if reloaded:
        model.save_pretrained(tmp_path)
        model = FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    before = run_flux(model)
    for arguments in ((torch.bfloat16,), ("cpu", torch.bfloat16), ("cpu",), (torch.device("cpu"), None), (None, None)):
        assert model.to(*arguments) is model
    assert model.to(dtype=torch.bfloat16) is model.to(device="cpu", dtype=None) is model
    for cast in (
        lambda: model.to(torch.float32),
        lambda: model.to("cpu", torch.float32),
        lambda: model.to(dtype=torch.float16, device="cpu"),
        model.half,
        model.float,
    ):
        with pytest.raises(ValueError, match="quantized model"):
            cast()
    assert torch.equal(run_flux(model), before)


def test_a_dequantized_model_is_free_again(flux):
    model = flux().transformer
    model.dequantize()
    assert model.to(torch.float16).dtype == torch.float16
    model.fuse_qkv_projections()
    assert not any("Guard" in type(value).__name__ for value in vars(model).values())


def test_a_deep_copy_of_a_pipeline(pixart):
    before = images(pixart)
    twin = copy.deepcopy(pixart)
    assert torch.equal(images(twin), before)
    with pytest.raises(ValueError, match="quantized model"):
        twin.transformer.to(torch.float16)
    twin.transformer.transformer_blocks[0].attn1.to_q.weight.data.zero_()
    assert not torch.equal(images(twin), before)
    assert torch.equal(images(pixart), before)
    if "rtn" in pixart.transformer.hf_quantizer.quantization_config.method:
        twin.transformer.dequantize()
        twin.to(torch.float16)
    assert torch.equal(images(pixart), before)


def test_pickling(flux, run_flux):
    model = flux().transformer
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(run_flux(twin), run_flux(model))
    assert twin.to(torch.float32) is twin
    with pytest.raises(ValueError, match="quantized model"):
        twin.to(torch.float16)


# Joining and casting of weights


@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_joining_query_key_and_value_is_refused(flux, tmp_path, name, reloaded):
    pipe = flux() if name == "flux" else quantized(tiny_pixart_pipeline(), "htg")
    if reloaded:
        pipe.transformer.save_pretrained(tmp_path)
        pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path)
    tensors = {key: tensor.clone() for key, tensor in pipe.transformer.state_dict().items()}
    with pytest.raises(ValueError, match="fuse_qkv_projections joins weights without their scales"):
        pipe.transformer.fuse_qkv_projections()
    after = pipe.transformer.state_dict()
    assert tensors.keys() == after.keys() and all(torch.equal(after[key], tensors[key]) for key in tensors)


def test_a_joined_model_is_not_quantized(tiny_flux):
    pipe = tiny_flux()
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="fuse"):
        dq.quantize(pipe, dq.DQConfig("rtn"), progress=False)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("build", [tiny_pipeline, tiny_pixart_pipeline])
def test_layerwise_casting_is_of_what_is_in_full_precision(build, config):
    """Quantized layers stay as they are: the error is that of casting the rest, as of the original."""
    full, pipe = build(), quantized(build(), config)
    layers = {name: m for name, m in pipe.transformer.named_modules() if isinstance(m, QuantizedLinear)}
    before, plain = images(pipe), images(full)
    kept = {name: {key: t.clone() for key, t in layer.state_dict().items()} for name, layer in layers.items()}
    for each in (full, pipe):
        each.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    stored = {p.dtype for p in pipe.transformer.parameters()}
    assert torch.float8_e4m3fn in stored
    for name, layer in layers.items():
        assert all(torch.equal(tensor, kept[name][key]) for key, tensor in layer.state_dict().items())
    cast = images(pipe)
    # the original has all of its linears cast, the quantized a few
    assert 0 < (cast - before).norm() < 2 * (images(full) - plain).norm()


# The other parts of a pipeline


def test_vae_tiling_and_slicing():
    pipe = quantized(tiny_pipeline(), "htg")
    before = images(pipe)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(images(pipe), before, rtol=0, atol=1e-5)  # a convolution of one image, not of two
    pipe.vae.disable_slicing()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 4, 4
    pipe.vae.enable_tiling()
    tiled = images(pipe)
    assert tiled.shape == before.shape and not torch.equal(tiled, before)
    pipe.vae.disable_tiling()
    assert torch.equal(images(pipe), before)


def test_another_vae_and_another_scheduler(tiny_flux):
    pipe = quantized(tiny_pipeline(), "htg")
    before = pipe.transformer.state_dict()
    pipe.register_modules(vae=AutoencoderTiny(latent_channels=4).eval())
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    assert torch.isfinite(images(pipe)).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.transformer.state_dict().items())


# Training


@pytest.mark.parametrize("config", CONFIGS)
def test_a_quantized_model_is_for_inference(config, run_dit):
    model = quantized(tiny_pipeline(), config).transformer
    assert model.hf_quantizer.is_trainable is False
    outputs = run_dit(model)
    labels, timestep = torch.tensor([1, 2]), torch.tensor([500, 500])
    noise = torch.randn(2, 4, 8, 8, requires_grad=True)
    model.train()
    loss = model(noise, timestep=timestep, class_labels=labels).sample.square().mean()
    with pytest.raises(RuntimeError, match="has no gradient: quantized layers are for inference"):
        loss.backward()
    assert noise.grad is None
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert layers and not any(p.requires_grad for layer in layers for p in layer.parameters())
    assert torch.equal(run_dit(model.eval()), outputs)


def test_an_adapter_cannot_be_trained_beside_a_quantized_layer(run_dit):
    model = quantized(tiny_pipeline(), "rtn").transformer
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"]), model)
    assert any(p.requires_grad for p in model.parameters())
    labels, timestep = torch.tensor([1, 2]), torch.tensor([500, 500])
    loss = model(torch.randn(2, 4, 8, 8), timestep=timestep, class_labels=labels).sample.square().mean()
    with pytest.raises(RuntimeError, match="has no gradient: quantized layers are for inference"):
        loss.backward()


# Dequantizing


@pytest.mark.parametrize("config", [dict(method="htg", groups=3), dict(method="smoothquant")])
def test_dequantizing_what_is_folded_into_modulations_is_refused_before_anything_changes(config):
    pipe = tiny_pixart_pipeline()
    dq.quantize(pipe, dq.DQConfig(**config), calls=[PIXART_CALL], num_inference_steps=4, progress=False)
    before = images(pipe)
    with pytest.raises(
        ValueError, match="transforms of 2 blocks are folded into the modulation .* original checkpoint"
    ):
        pipe.transformer.dequantize()
    assert torch.equal(images(pipe), before)
    assert pipe.transformer.is_quantized
    with pytest.raises(ValueError, match="quantized model"):
        pipe.transformer.to(torch.float16)


@pytest.mark.parametrize("build", [tiny_pipeline, tiny_pixart_pipeline])
def test_a_dequantized_pipeline_is_what_rounding_its_weights_left(build, tmp_path):
    """Inputs are rounded no more: it is as near to the original as W8A16 is."""
    full, pipe, weights = build(), quantized(build(), "rtn"), build()
    dq.quantize(weights, dq.DQConfig("rtn", weight_bits=4, activation_bits=16), progress=False)
    pipe.transformer.dequantize()
    # fp32 sums in another order
    torch.testing.assert_close(images(pipe), images(weights), rtol=0, atol=1e-4)
    assert not torch.allclose(images(pipe), images(full), rtol=0, atol=1e-3)
    pipe.save_pretrained(tmp_path)
    again = type(pipe.transformer).from_pretrained(tmp_path, subfolder="transformer")
    assert not getattr(again, "is_quantized", False)
    pipe.transformer = again
    torch.testing.assert_close(images(pipe), images(weights), rtol=0, atol=1e-4)
