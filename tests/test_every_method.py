# SPDX-License-Identifier: Apache-2.0
"""What holds for each method that is registered: a new one is covered by its name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from support import PIXART_CALL, assert_close, tiny_pixart_pipeline

import diffusers_dq as dq
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.methods import METHODS
from diffusers_dq.specs import spec_of

NAMES = sorted(dq.methods())
WITH_A_PART_OF_ITS_OWN = ["svdquant", "tfmq", "g4w_p4a", "ptqd"]
INTEGERS = (torch.int8, torch.uint8)


def config(method: str, **changes: Any) -> dq.DQConfig:
    """Its own settings, as far as width 32 and a test's patience allow: rank 32 would be as large as the weight."""
    recipe = METHODS[method].recipe
    settings: dict[str, Any] = {"low_rank": 4 if recipe.low_rank else None}
    if recipe.rounding == "adaround":
        settings["reconstruction"] = dict(iterations=5)
    return dq.DQConfig(method, **{**settings, **changes})


def quantized_pipe(folder: Path, statistics: dq.Statistics, method: str, **changes: Any) -> DiTPipeline:
    pipe = DiTPipeline.from_pretrained(folder)
    dq.quantize(pipe, config(method, **changes), statistics=statistics, progress=False)
    return pipe


@pytest.fixture(scope="module")
def quantized(dit_folder, dit_statistics):
    """A function: the pipeline quantized by a method at W8A8, made once."""
    made: dict[str, DiTPipeline] = {}

    def get(method: str) -> DiTPipeline:
        if method not in made:
            made[method] = quantized_pipe(dit_folder, dit_statistics, method)
        return made[method]

    return get


@pytest.fixture(scope="module")
def full(dit_folder, run_dit) -> torch.Tensor:
    return run_dit(DiTPipeline.from_pretrained(dit_folder).transformer)


def decibels(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().mean() / (output - expected).square().mean()))


@pytest.mark.parametrize("method", NAMES)
def test_every_linear_of_the_blocks_becomes_an_integer_layer_and_the_report_says_so(method, quantized):
    pipe = quantized(method)
    report = dq.inspect(pipe)
    layers = {n: m for n, m in pipe.transformer.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 14, "in each of two blocks: modulation, query, key, value, output, two of the MLP"
    assert all(layer.weight.dtype in INTEGERS for layer in layers.values())
    assert report.method == method
    assert {row.name for row in report.quantized} == set(layers)
    assert all(row.bits == ("W8A8" if layers[row.name].layout.rounds_input else "W8A16") for row in report.quantized)
    assert all(layers[name].layout.rounds_input for name in layers if not name.endswith("norm1.linear"))


@pytest.mark.parametrize("method", NAMES)
def test_the_output_stays_close_to_full_precision(method, quantized, full, run_dit):
    """8 bits leave some 35 to 45 dB at these sizes; a fold that went wrong leaves next to nothing."""
    snr = decibels(run_dit(quantized(method).transformer), full)
    print(f"\n{method} W8A8: {snr:.1f} dB")
    assert snr > 25


@pytest.mark.parametrize("method", NAMES)
def test_four_bits_are_packed_and_still_close(method, dit_folder, dit_statistics, full, run_dit):
    pipe = quantized_pipe(dit_folder, dit_statistics, method, weight_bits=4)
    snr = decibels(run_dit(pipe.transformer), full)
    print(f"\n{method} W4A8: {snr:.1f} dB")
    assert snr > 10
    assert pipe.transformer.transformer_blocks[0].attn1.to_q.weight.dtype == torch.uint8


@pytest.mark.parametrize("method", NAMES)
def test_a_saved_model_reloads_to_the_same_bits(method, quantized, run_dit, tmp_path):
    pipe = quantized(method)
    report = dq.inspect(pipe)
    pipe.save_pretrained(tmp_path)
    reloaded = DiTPipeline.from_pretrained(tmp_path)
    assert torch.equal(run_dit(reloaded.transformer), run_dit(pipe.transformer))
    assert dq.inspect(reloaded) == report


@pytest.mark.parametrize("method", NAMES)
def test_a_bf16_model_stays_close_and_reloads_to_the_same_bits(
    method, dit_folder, dit_statistics, full, run_dit, tmp_path
):
    """bf16 alone leaves some 40 dB, of activations of 8 bits each."""
    pipe = DiTPipeline.from_pretrained(dit_folder, torch_dtype=torch.bfloat16)
    dq.quantize(pipe, config(method), statistics=dit_statistics, progress=False)
    output = run_dit(pipe.transformer)
    assert output.dtype == torch.bfloat16
    assert decibels(output.float(), full) > 25
    pipe.save_pretrained(tmp_path)
    reloaded = DiTPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert torch.equal(run_dit(reloaded.transformer), output)


@pytest.mark.parametrize("method", ["svdquant", "g4w_p4a", "ptqd", "tfmq"])
def test_with_statistics_in_the_config_it_quantizes_while_loading(
    method, quantized, dit_folder, dit_statistics_path, run_dit
):
    settings = config(method, statistics=dit_statistics_path)
    model = DiTTransformer2DModel.from_pretrained(dit_folder / "transformer", quantization_config=settings)
    assert torch.equal(run_dit(model), run_dit(quantized(method).transformer))


def test_a_saved_model_is_reported_as_before(dit_folder, tmp_path):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    report = dq.quantize(pipe, dq.DQConfig("rtn"), progress=False)
    pipe.save_pretrained(tmp_path)
    assert dq.inspect(pipe) == report


@pytest.mark.parametrize("method", NAMES)
def test_its_transforms_alone_are_the_original_function(method, dit_folder, dit_statistics, run_dit):
    """In fp64, where only sums in another order and tables made from fp32 statistics, exactly inverted, remain."""
    pipe = DiTPipeline.from_pretrained(dit_folder, torch_dtype=torch.float64)
    expected = run_dit(pipe.transformer)
    settings = config(method, weight_bits=16, activation_bits=16)
    dq.quantize(pipe, settings, statistics=dit_statistics, progress=False)
    assert (run_dit(pipe.transformer) - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("method", WITH_A_PART_OF_ITS_OWN)
@torch.no_grad()
def test_one_compiled_graph_serves_all_steps(method, quantized, run_dit):
    model = quantized(method).transformer
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    given = dict(hidden_states=torch.randn(2, 4, 8, 8), class_labels=torch.tensor([1, 2]))
    compiled(timestep=torch.tensor([900, 900]), **given)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (900, 500, 12):
            timestep = torch.tensor([step, step])
            assert_close(compiled(timestep=timestep, **given).sample, model(timestep=timestep, **given).sample)


@pytest.fixture(scope="module")
def pixart_statistics() -> dq.Statistics:
    pipe = tiny_pixart_pipeline()
    return dq.calibrate(pipe, [PIXART_CALL], num_inference_steps=4, samples=4, second_moments=True, progress=False)


@torch.no_grad()
def run_pixart(model: torch.nn.Module) -> torch.Tensor:
    seed = torch.Generator().manual_seed(0)
    noise, text = (torch.randn(*shape, generator=seed).to(model.dtype) for shape in ((2, 4, 8, 8), (2, 5, 32)))
    sizes = {"resolution": None, "aspect_ratio": None}
    steps = [torch.tensor([t, t]) for t in (950, 500, 20)]
    return torch.stack([model(noise, text, timestep=t, added_cond_kwargs=sizes).sample for t in steps])


@pytest.mark.parametrize("method", NAMES)
def test_a_text_model(method, pixart_statistics, tmp_path):
    pipe = tiny_pixart_pipeline()
    expected = run_pixart(pipe.transformer)
    dq.quantize(pipe, config(method), statistics=pixart_statistics, progress=False)
    output = run_pixart(pipe.transformer)
    assert len(dq.inspect(pipe).quantized) == 16, "eight in each of two blocks: all but key and value of the text"
    assert decibels(output, expected) > 25
    pipe.transformer.save_pretrained(tmp_path)
    assert torch.equal(run_pixart(type(pipe.transformer).from_pretrained(tmp_path)), output)


@pytest.mark.parametrize("method", NAMES)
def test_its_transforms_alone_are_the_original_function_where_blocks_share_a_modulation(method, pixart_statistics):
    """PixArt's (methods.md, 0.1 c): what a block is called with carries some of them, others are made online; fp64."""
    pipe = tiny_pixart_pipeline()
    pipe.transformer.double()
    expected = run_pixart(pipe.transformer)
    settings = config(method, weight_bits=16, activation_bits=16)
    dq.quantize(pipe, settings, statistics=pixart_statistics, progress=False)
    assert (run_pixart(pipe.transformer) - expected).norm() <= 1e-10 * expected.norm()


@pytest.fixture(scope="module")
def unknown_statistics(tiny_unknown, unknown_call) -> dq.Statistics:
    settings = dict(num_inference_steps=4, samples=4, second_moments=True, progress=False)
    return dq.calibrate(tiny_unknown(), [unknown_call], **settings)


@pytest.mark.parametrize("method", ["awq", "g4w_p4a", "ptqd", "qdiffusion", "repq", "svdquant", "tfmq"])
def test_a_model_of_tokens_without_a_spec(method, tiny_unknown, run_unknown, unknown_statistics, tmp_path):
    pipe = tiny_unknown()
    expected = run_unknown(pipe.transformer)
    dq.quantize(pipe, config(method), statistics=unknown_statistics, progress=False)
    output = run_unknown(pipe.transformer)
    assert dq.inspect(pipe).quantized
    assert decibels(output, expected) > 25
    pipe.transformer.save_pretrained(tmp_path)
    assert torch.equal(run_unknown(type(pipe.transformer).from_pretrained(tmp_path)), output)


# Storage, by counting


def test_the_parameters_of_dit_xl_2():
    """675.13 million with the position embedding, which diffusers keeps as a buffer, and embedders counted once; two
    thirds of them in weights of the blocks, one third in weights of the modulation."""
    with torch.device("meta"):
        model = DiTTransformer2DModel(num_layers=28, sample_size=32, num_embeds_ada_norm=1000, out_channels=8)
    duplicates = {f"{copied}." for copied, _ in spec_of(model).duplicates}
    once = {
        n: p.numel() for n, p in model.named_parameters() if not any(n.startswith(copied) for copied in duplicates)
    }
    assert round((sum(once.values()) + model.pos_embed.pos_embed.numel()) / 1e6, 2) == 675.13
    of_blocks = sum(
        n for name, n in once.items() if ".norm1." not in name and name.endswith("weight") and "blocks" in name
    )
    modulation = sum(n for name, n in once.items() if name.endswith("norm1.linear.weight"))
    assert (round(of_blocks / 1e6, 1), round(modulation / 1e6, 2)) == (445.9, 222.95)


@pytest.mark.parametrize("groups", [3, 10])
def test_a_timestep_group_of_htg_costs_14_c_a_block(groups, dit_folder, dit_statistics):
    """Biases of query, key, value 3 C, output C, MLP 4 C, and of all 6 C rows of the modulation, in fp32. (The paper
    counts 2 C of the modulation, those that shift, and C for the output's own shift: 11 C in fp16.)"""
    sizes = [
        dq.inspect(quantized_pipe(dit_folder, dit_statistics, "htg", groups=g, scope="model")).nbytes
        for g in (2, groups)
    ]
    assert sizes[1] - sizes[0] == (groups - 2) * 14 * 32 * 4 * 2
