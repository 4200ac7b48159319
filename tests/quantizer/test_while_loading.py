# SPDX-License-Identifier: Apache-2.0
"""Quantized while it loads, or loaded to be quantized: the bits are those of quantizing afterwards."""

import logging

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline, FluxTransformer2DModel, PipelineQuantizationConfig
from saved_models import HTG, LINEAR, RTN, VARIANTS, edit_weights, generate, load, saved_config, weights_file
from support import CALLS

import diffusers_dq as dq
from diffusers_dq.linear import QuantizedLinear

# Quantizing while loading


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("variant", ["rtn-w8a8", "rtn-w4a8", "rtn-w4a16", "rtn-w16a16"])
def test_rtn_while_loading_is_rtn_after_loading(saved, dit_folder, run_dit, variant, dtype):
    _, outputs, _ = saved[variant]
    model = load(dit_folder, torch_dtype=dtype, quantization_config=dq.DQConfig(**VARIANTS[variant]))
    assert torch.equal(run_dit(model), outputs)


def test_rtn_while_loading_in_bf16_rounds_the_fp32_weights(quantized, dit_folder):
    model = load(dit_folder, torch_dtype=torch.bfloat16, quantization_config=dq.DQConfig(**RTN))
    reference = quantized("rtn-w8a8").transformer.state_dict()
    assert model.dtype == torch.bfloat16
    for name in ("weight", "weight_scale"):
        assert torch.equal(model.state_dict()[f"{LINEAR}.{name}"], reference[f"{LINEAR}.{name}"])
    assert torch.equal(model.state_dict()[f"{LINEAR}.bias"], reference[f"{LINEAR}.bias"].bfloat16())


def test_what_was_quantized_while_loading_saves_and_reloads(saved, dit_folder, run_dit, tmp_path):
    model = load(dit_folder, quantization_config=dq.DQConfig(**VARIANTS["rtn-w4a8"]))
    model.save_pretrained(tmp_path / "transformer")
    assert torch.equal(run_dit(load(tmp_path)), run_dit(model))
    assert weights_file(tmp_path).read_bytes() == weights_file(saved["rtn-w4a8"][0]).read_bytes()


def test_a_full_precision_checkpoint_that_lacks_a_weight_is_an_error(dit_folder, tmp_path):
    load(dit_folder).save_pretrained(tmp_path / "transformer")
    edit_weights(tmp_path, lambda tensors: tensors.pop(f"{LINEAR}.weight"))
    with pytest.raises(ValueError, match=rf"1 missing \({LINEAR}.weight\)"):
        load(tmp_path, quantization_config=dq.DQConfig(**RTN))


def test_statistics_in_the_config_quantize_while_loading(saved, dit_folder, dit_statistics_path, run_dit, tmp_path):
    _, outputs, _ = saved["htg-w4a8"]
    config = dq.DQConfig(**VARIANTS["htg-w4a8"], statistics=dit_statistics_path)
    model = load(dit_folder, quantization_config=config)
    assert torch.equal(run_dit(model), outputs)
    model.save_pretrained(tmp_path / "transformer")
    assert torch.equal(run_dit(load(tmp_path)), outputs)


def test_the_users_config_is_not_changed_by_loading(dit_folder, dit_statistics_path):
    config = dq.DQConfig(**HTG, statistics=dit_statistics_path)
    before = config.to_dict()
    load(dit_folder, quantization_config=config)
    assert config.to_dict() == before


@pytest.mark.parametrize("variant", ["rtn-w4a8", "htg-w4a8"])
def test_a_dict_serves_as_config_and_what_was_done_is_saved(
    saved, dit_folder, dit_statistics_path, run_dit, tmp_path, variant
):
    _, outputs, _ = saved[variant]
    config = VARIANTS[variant] | {"quant_method": "diffusers_dq", "statistics": dit_statistics_path}
    load(dit_folder, quantization_config=config).save_pretrained(tmp_path / "transformer")
    assert LINEAR in saved_config(tmp_path)["result"]["linears"]
    assert torch.equal(run_dit(load(tmp_path)), outputs)


def test_a_pipeline_quantization_config_names_the_component(saved, dit_folder):
    config = PipelineQuantizationConfig(quant_mapping={"transformer": dq.DQConfig(**VARIANTS["rtn-w4a8"])})
    pipe = DiffusionPipeline.from_pretrained(dit_folder, quantization_config=config)
    assert torch.equal(generate(pipe), saved["rtn-w4a8"][2])


def test_a_pipeline_does_not_take_the_config_of_a_model(dit_folder):
    with pytest.raises(ValueError, match="PipelineQuantizationConfig"):
        DiffusionPipeline.from_pretrained(dit_folder, quantization_config=dq.DQConfig(**RTN))


@pytest.mark.parametrize("name", ["rtn-w4a8", "htg-w4a8"])
def test_one_device_for_all_is_a_fine_device_map(saved, run_dit, name):
    folder, outputs, _ = saved[name]
    assert torch.equal(run_dit(load(folder, device_map={"": "cpu"})), outputs)


def test_a_device_map_while_quantizing(saved, dit_folder, run_dit):
    _, outputs, _ = saved["rtn-w4a8"]
    config = dq.DQConfig(**VARIANTS["rtn-w4a8"])
    assert torch.equal(run_dit(load(dit_folder, device_map="cpu", quantization_config=config)), outputs)


def test_parts_on_disk_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="puts parts of the model on disk"):
        load(saved["rtn-w4a8"][0], device_map={"": "cpu", "proj_out_2": "disk"}, offload_folder=tmp_path)


# A prepared model: loaded in full precision, statistics still to come


@pytest.fixture
def prepared(dit_folder):
    """A function: the pipeline of `dit_folder` with a transformer prepared for HTG."""

    def build(**arguments):
        config = PipelineQuantizationConfig(quant_mapping={"transformer": dq.DQConfig(**VARIANTS["htg-w4a8"])})
        return DiTPipeline.from_pretrained(dit_folder, quantization_config=config, **arguments)

    return build


def test_a_method_that_needs_statistics_loads_in_full_precision_and_warns(prepared, dit_folder, run_dit, caplog):
    with caplog.at_level(logging.WARNING, "diffusers_dq"):
        model = prepared().transformer
    assert "prepared for method 'htg': run dq.calibrate(pipe, ...) and dq.quantize(pipe)" in caplog.text
    assert torch.equal(run_dit(model), run_dit(load(dit_folder)))


def test_a_prepared_model_is_not_saved(prepared, tmp_path):
    pipe = prepared()
    for part in (pipe.transformer, pipe):
        with pytest.raises(ValueError, match=r"prepared for 'htg' but not quantized; run dq.calibrate"):
            part.save_pretrained(tmp_path)


def test_calibrate_and_quantize_finish_a_prepared_pipeline(prepared, saved, run_dit, tmp_path):
    pipe = prepared()
    dq.calibrate(pipe, CALLS, num_inference_steps=10, progress=False)
    dq.quantize(pipe, progress=False)
    assert torch.equal(run_dit(pipe.transformer), saved["htg-w4a8"][1])
    pipe.save_pretrained(tmp_path)
    assert torch.equal(generate(DiTPipeline.from_pretrained(tmp_path)), saved["htg-w4a8"][2])


def test_a_prepared_pipeline_may_be_cast(prepared, dit_folder, dit_statistics, run_dit):
    pipe, plain = prepared().to(torch.bfloat16), load(dit_folder).to(torch.bfloat16)
    for model in (pipe, plain):
        dq.quantize(model, dq.DQConfig(**VARIANTS["htg-w4a8"]), statistics=dit_statistics, progress=False)
    assert pipe.transformer.dtype == torch.bfloat16
    assert torch.equal(run_dit(pipe.transformer), run_dit(plain))


def test_a_prepared_model_without_statistics_says_that_it_needs_them(prepared):
    with pytest.raises(ValueError, match="needs statistics: calibrate first"):
        dq.quantize(prepared())


def test_a_prepared_model_may_be_quantized_another_way(prepared, saved, run_dit):
    pipe = prepared()
    dq.quantize(pipe, dq.DQConfig(**VARIANTS["rtn-w8a8"]), progress=False)
    assert torch.equal(run_dit(pipe.transformer), saved["rtn-w8a8"][1])


# A single file of an original checkpoint


@pytest.fixture
def from_single_file(tiny_flux, tmp_path):
    """A function: a tiny Flux from one file, as published checkpoints come. DiT has no `from_single_file`."""

    def build(config, **arguments):
        tiny_flux().transformer.save_pretrained(tmp_path / "full")
        file = tmp_path / "full" / "diffusion_pytorch_model.safetensors"
        return FluxTransformer2DModel.from_single_file(
            str(file), config=str(tmp_path / "full"), quantization_config=dq.DQConfig(**config), **arguments
        )

    return build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_file_is_quantized_while_loading_and_saved(from_single_file, run_flux, tmp_path, dtype):
    model = from_single_file(VARIANTS["rtn-w4a8"], torch_dtype=dtype)
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    model.save_pretrained(tmp_path / "quantized")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "quantized", torch_dtype=dtype)
    assert again.dtype == model.dtype == dtype
    assert torch.equal(run_flux(again), run_flux(model))


def test_a_single_file_is_quantized_as_a_folder_is(from_single_file, run_flux, tmp_path):
    model = from_single_file(RTN)
    reference = FluxTransformer2DModel.from_pretrained(tmp_path / "full", quantization_config=dq.DQConfig(**RTN))
    assert torch.equal(run_flux(model), run_flux(reference))


def test_a_single_file_may_be_prepared(from_single_file, run_flux, tmp_path):
    model = from_single_file(HTG)
    assert torch.equal(run_flux(model), run_flux(FluxTransformer2DModel.from_pretrained(tmp_path / "full")))
    with pytest.raises(ValueError, match="prepared for 'htg' but not quantized"):
        model.save_pretrained(tmp_path / "prepared")
