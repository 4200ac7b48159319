# SPDX-License-Identifier: Apache-2.0
"""One compiled graph serves every step, group and step count."""

import re

import pytest
import torch
import torch._dynamo.testing
from diffusers import DiTPipeline, DPMSolverMultistepScheduler
from support import CALLS, PIXART_CALL, assert_close, tiny_pipeline, tiny_pixart_pipeline
from torch._inductor.utils import run_and_get_code

import diffusers_dq as dq

CONFIGS = {
    "htg-w8a8": dict(method="htg", groups=4),
    "htg-w4a8-online-per-layer": dict(
        method="htg", weight_bits=4, groups=3, online=True, scope="layer", ranges="group"
    ),
    "rtn-w8a8-dynamic": dict(method="rtn"),
    "qdit-w4a8": dict(method="qdit", weight_bits=4, group_size=32),
    "quarot-w4a8-dynamic": dict(method="quarot", weight_bits=4),
}


def inputs(step: int, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return dict(
        hidden_states=torch.randn(batch, 4, 8, 8, generator=generator),
        timestep=torch.full((batch,), step),
        class_labels=torch.zeros(batch, dtype=torch.long),
    )


@pytest.fixture(scope="module")
def statistics():
    return dq.calibrate(tiny_pipeline(), CALLS, num_inference_steps=10, progress=False)


def quantized(name: str, statistics: dq.Statistics, pipe: DiTPipeline | None = None) -> torch.nn.Module:
    model = (pipe or tiny_pipeline()).transformer
    dq.quantize(model, dq.DQConfig(**CONFIGS[name]), statistics=statistics, progress=False)
    return model


def outputs(model: torch.nn.Module, step: int) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(step)).sample


@pytest.mark.parametrize("name", CONFIGS)
def test_no_break_and_no_recompilation_over_the_steps(name, statistics):
    model = quantized(name, statistics)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    groups = set()
    with torch.no_grad():
        compiled(**inputs(900))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in (900, 777, 500, 301, 300, 12, 0):
                output = compiled(**inputs(step)).sample
                groups.add(tuple(model.timestep_groups.index.tolist()))
                assert_close(output, model(**inputs(step)).sample)
    if "htg" in name:
        assert len(groups) >= 3, "the steps were of several groups"


def test_a_graph_that_python_numbers_switch_would_be_caught():
    """The check above can fail: an attribute that changes as a Python number does recompile."""
    module = torch.nn.Linear(2, 2)
    module.step = 0
    module.register_forward_pre_hook(lambda m, args: (args[0] * m.step,))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    compiled(torch.ones(1, 2))
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(Exception, match="[Rr]ecompil"):
        for step in (1, 2, 3):
            module.step = step
            compiled(torch.ones(1, 2))


@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph_serves_all_batch_sizes(name, statistics):
    model = quantized(name, statistics)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        compiled(**inputs(900, batch=5))  # not 4, the number of channels: sizes that are equal become one symbol
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch, step in ((2, 900), (3, 500), (8, 12)):
                given = inputs(step, batch)
                assert_close(compiled(**given).sample, model(**given).sample)


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_share_one_graph(name, statistics):
    """Regional compilation: diffusers leaves DiT's `_repeated_blocks` empty, quantizing fills it."""
    pipe = tiny_pipeline(num_layers=5)
    model = quantized(name, dq.calibrate(pipe, CALLS, num_inference_steps=5, progress=False), pipe)
    assert type(model)._repeated_blocks == [] and model._repeated_blocks == ["BasicTransformerBlock"]
    expected = [outputs(model, step) for step in (900, 500, 12)]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    first = outputs(model, 900)
    # The first block's input has other strides, in full precision too. By layer, v may or may not share q's partition.
    assert counter.frame_count == 2 or ("layer" in name and counter.frame_count == 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, output in zip((900, 500, 12), expected, strict=True):
            assert_close(outputs(model, step), output)
    assert_close(first, expected[0])


@pytest.mark.parametrize("skipped", [[], ["transformer_blocks.0.attn2"]], ids=["all blocks", "one partly skipped"])
@pytest.mark.parametrize("method", ["rtn", "htg"])
def test_pixart_compiles_by_block_too(method, skipped):
    pipe = tiny_pixart_pipeline()
    statistics = dq.calibrate(pipe, [PIXART_CALL], num_inference_steps=6, progress=False) if method == "htg" else None
    pixart = pipe.transformer
    dq.quantize(pixart, dq.DQConfig(method, modules_to_not_convert=skipped), statistics=statistics, progress=False)
    assert pixart._repeated_blocks == ["BasicTransformerBlock"]

    def given(step):
        torch.manual_seed(0)
        return dict(
            hidden_states=torch.randn(2, 4, 8, 8),
            encoder_hidden_states=torch.randn(2, 5, 32),
            timestep=torch.tensor([step, step]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )

    with torch.no_grad():
        expected = {step: pixart(**given(step)).sample for step in (900, 500, 20)}
        torch._dynamo.reset()
        pixart.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert_close(pixart(**given(500)).sample, expected[500])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step, output in expected.items():
                assert_close(pixart(**given(step)).sample, output)


def test_dequantizing_takes_the_block_names_back(statistics):
    model = tiny_pipeline().transformer
    dq.quantize(model, dq.DQConfig("rtn"), progress=False)
    model.dequantize()
    assert model._repeated_blocks == []


def test_the_number_of_steps_does_not_recompile(statistics):
    pipe = tiny_pipeline()
    dq.quantize(pipe, dq.DQConfig(**CONFIGS["htg-w8a8"]), statistics=statistics, progress=False)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    call = dict(class_labels=[1, 2], guidance_scale=1.5, output_type="np")
    pipe.set_progress_bar_config(disable=True)
    pipe(**call, num_inference_steps=3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        pipe(**call, num_inference_steps=7)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe(**call, num_inference_steps=4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
@pytest.mark.parametrize("name", CONFIGS)
def test_inductor_computes_the_same(name, mode, statistics):
    model = quantized(name, statistics)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for step in (900, 300, 12):
            expected, output = model(**inputs(step)).sample, compiled(**inputs(step)).sample
            # fusion may flip a rounding: one step of an activation is 1/255 of its range
            assert (output - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.slow
def test_inductor_fuses_the_rounding(statistics):
    """In no kernel alone: it is read by the product it was made for, or made by the one before."""
    model = quantized("htg-w8a8", statistics)
    torch._dynamo.reset()
    with torch.no_grad():
        _, codes = run_and_get_code(torch.compile(model, fullgraph=True), **inputs(500))
    code = "\n".join(codes)
    assert "diffusers_dq.quantize" not in re.sub("#.*", "", code) and "_int_mm" in code
    assert re.search(r"cpp_fused\w*native_layer_norm\w*round", code), "rounding rides on the norm"
    assert re.search(r"cpp_fused\w*round\w*sigmoid", code), "and on the activation"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("name", CONFIGS)
def test_cuda_graphs_serve_all_steps(name, mode, statistics):
    model = quantized(name, statistics).to("cuda", torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for step in (900, 300, 12, 900):
            given = {k: v.cuda() for k, v in inputs(step).items()}
            given["hidden_states"] = given["hidden_states"].bfloat16()
            expected, output = model(**given).sample, compiled(**given).sample.clone()
            assert (output - expected).norm() <= 0.05 * expected.norm()
