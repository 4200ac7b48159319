# SPDX-License-Identifier: Apache-2.0
"""LoRA beside quantized linears: what diffusers' loaders and peft make of them, and what is refused."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, FluxTransformer2DModel, ModelMixin
from peft import LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

import diffusers_dq as dq
from diffusers_dq.linear import QuantizedLinear

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FOLDED = r"method 'htg' has folded transforms into this model: .*'rtn', 'qdiffusion', 'quarot' or 'qdit'"
FILE = "pytorch_lora_weights.safetensors"
FULL = dict(weight_bits=16, activation_bits=16)


def lora(seed: int = 0, rank: int = 4, targets: Any = ATTENTION, **more: Any) -> LoraConfig:
    """Not zero, as a fresh one would be, and of the size of the weights."""
    torch.manual_seed(seed)
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False, **more)


@pytest.fixture(scope="module")
def loras(tiny_flux, tmp_path_factory) -> Callable[..., str]:
    """A function: the folder of a LoRA of the tiny Flux in diffusers' format."""

    def build(seed: int = 0, rank: int = 4) -> str:
        pipe = tiny_flux()
        pipe.transformer.add_adapter(lora(seed, rank))
        folder = str(tmp_path_factory.mktemp(f"lora{seed}"))
        pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
        return folder

    return build


@pytest.fixture
def flux(tiny_flux) -> Callable[..., Any]:
    """A function: the tiny Flux pipeline, quantized, or as it is where no method is given."""

    def build(method: str = "", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
        pipe = tiny_flux().to(dtype)
        if method:
            dq.quantize(pipe, dq.DQConfig(method, **config), progress=False)
        return pipe

    return build


@pytest.fixture(scope="module")
def flux_call() -> dict[str, Any]:
    seed = torch.Generator().manual_seed(0)
    prompt, pooled = torch.randn(1, 4, 32, generator=seed), torch.randn(1, 32, generator=seed)
    return dict(prompt_embeds=prompt, pooled_prompt_embeds=pooled, height=64, width=64, output_type="latent")


def difference(run: Callable[[nn.Module], torch.Tensor], left: Any, right: Any) -> float:
    return float((run(left.transformer).float() - run(right.transformer).float()).norm())


# Loading


@pytest.mark.parametrize("config", [dict(method="rtn"), dict(method="rtn", weight_bits=4), dict(method="quarot")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_does_to_the_quantized_what_it_does_to_the_original(flux, loras, run_flux, config, dtype):
    full, quantized, plain = flux(dtype=dtype), flux(dtype=dtype, **config), flux(dtype=dtype)
    before, without = difference(run_flux, quantized, full), run_flux(quantized.transformer)
    folder = loras()
    for pipe in (full, quantized):
        if config.get("weight_bits") == 4:  # FluxPipeline.load_lora_weights: see below
            pipe.transformer.load_lora_adapter(folder, weight_name=FILE, use_safetensors=True)
        else:
            pipe.load_lora_weights(folder)
    with_lora = run_flux(quantized.transformer)
    assert with_lora.dtype == quantized.transformer.dtype == dtype
    # the error is that of rounding the same linears, on activations that the adapter has changed
    assert difference(run_flux, quantized, full) < 2 * before < difference(run_flux, full, plain)
    quantized.unload_lora_weights()
    assert torch.equal(run_flux(quantized.transformer), without)
    assert not hasattr(quantized.transformer, "peft_config")


def test_several_adapters_and_their_weights(flux, loras, run_flux):
    full, quantized = flux(), flux("rtn")
    error = difference(run_flux, quantized, full)
    for pipe in (full, quantized):
        for seed, name in enumerate("ab"):
            pipe.load_lora_weights(loras(seed), adapter_name=name)
    alone = {}
    for names, weights in ((["a"], [1.0]), (["b"], [1.0]), (["a", "b"], [0.7, -0.4])):
        for pipe in (full, quantized):
            pipe.set_adapters(names, weights)
        assert difference(run_flux, quantized, full) < 2 * error
        alone[tuple(names)] = run_flux(quantized.transformer)
    outputs = list(alone.values())
    assert min(float((x - y).norm()) for x, y in zip(outputs, outputs[1:], strict=False)) > 4 * error
    quantized.delete_adapters("b")
    quantized.set_adapters(["a"])
    assert torch.equal(run_flux(quantized.transformer), alone["a",])
    with pytest.raises(ValueError, match="already in use"):
        quantized.load_lora_weights(loras(0), adapter_name="a")
    assert torch.equal(run_flux(quantized.transformer), alone["a",])


@pytest.mark.parametrize("compiled", [False, True])
def test_hotswapping(flux, loras, run_flux, compiled):
    first, second = loras(0, rank=2), loras(1, rank=4)
    expected = flux("rtn")
    expected.load_lora_weights(second)
    pipe = flux("rtn")
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(first, adapter_name="style")
    torch.compiler.reset()
    if compiled:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    before = run_flux(pipe.transformer)
    with torch._dynamo.config.patch(error_on_recompile=True):
        pipe.load_lora_weights(second, adapter_name="style", hotswap=True)
        swapped = run_flux(pipe.transformer)
    reference = run_flux(expected.transformer)
    # ranks are padded with zeros, which changes the order of sums: some roundings go the other way
    assert (swapped - reference).norm() < 1e-2 * reference.norm() < (before - reference).norm()


def test_an_adapter_is_exact_beside_transforms_that_the_layer_makes_itself(dit_folder, dit_statistics, run_dit):
    """Without rounding, in fp64: shifted, scaled by the layer itself, an adapter reads the input as it was."""
    full = DiTPipeline.from_pretrained(dit_folder, torch_dtype=torch.float64).transformer
    quantized = copy.deepcopy(full)
    config = dq.DQConfig("htg", groups=3, online=True, **FULL)
    dq.quantize(quantized, config, statistics=dit_statistics, progress=False)
    down = quantized.transformer_blocks[0].ff.net[2]
    assert down.input_shift is not None and len(down.input_shift) == 3 and down.input_inv_smooth is not None
    before = run_dit(full)
    for model in (full, quantized):
        inject_adapter_in_model(lora(targets=["net.2"]), model)
    torch.testing.assert_close(run_dit(quantized), run_dit(full), rtol=1e-10, atol=1e-10)
    assert (run_dit(full) - before).norm() > 1e-2 * before.norm()


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "norm1.linear"]


def test_without_folds_an_adapter_may_sit_anywhere(dit_folder, dit_statistics, run_dit, tmp_path):
    full = DiTPipeline.from_pretrained(dit_folder, torch_dtype=torch.float64).transformer
    quantized = copy.deepcopy(full)
    config = dq.DQConfig("htg", groups=3, fold=False, **FULL)
    report = dq.quantize(quantized, config, statistics=dit_statistics, progress=False)
    assert sum("fold=False" in row.reason for row in report.linears) == 10, "q, k, v, their output, MLP, of two blocks"
    quantized.save_pretrained(tmp_path)
    assert type(quantized).from_pretrained(tmp_path).hf_quantizer.quantization_config.fold is False
    for model in (full, quantized):
        inject_adapter_in_model(lora(targets=TARGETS), model)
    torch.testing.assert_close(run_dit(quantized), run_dit(full), rtol=1e-10, atol=1e-10)


def test_peft_on_a_class_that_diffusers_gives_no_adapters(dit_folder, run_dit):
    """DiT: the fused block stands back where a wrapper is, wherever it is."""
    full = DiTPipeline.from_pretrained(dit_folder).transformer
    assert not hasattr(full, "load_lora_adapter") and not hasattr(full, "add_adapter")
    quantized = copy.deepcopy(full)
    dq.quantize(quantized, dq.DQConfig("rtn"), progress=False)
    error = float((run_dit(quantized) - run_dit(full)).norm())
    for target in TARGETS:
        models = copy.deepcopy(full), copy.deepcopy(quantized)
        for model in models:
            inject_adapter_in_model(lora(targets=[target]), model)
        expected, output = map(run_dit, models)
        assert (output - expected).norm() < 3 * error, target
        assert (expected - run_dit(full)).norm() > 3 * error, target


def test_a_pipeline_without_lora_says_so(dit_folder):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    with pytest.raises(AttributeError, match="load_lora_weights"):
        pipe.load_lora_weights("somewhere")


# What is refused


def test_flux_pipelines_take_packed_weights_for_narrow_ones_and_their_transformer_does_not(flux, loras, run_flux):
    """diffusers (0.42) widens linears that look narrower than the LoRA, by their weight's shape: of Flux alone."""
    pipe = flux("rtn", weight_bits=4)
    before = run_flux(pipe.transformer)
    with pytest.raises(RuntimeError, match="Only Tensors of floating point"):
        pipe.load_lora_weights(loras())
    assert torch.equal(run_flux(pipe.transformer), before)
    pipe.transformer.load_lora_adapter(loras(), weight_name=FILE, use_safetensors=True)
    assert not torch.equal(run_flux(pipe.transformer), before)


@pytest.mark.parametrize("target", ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "norm1.linear"])
@pytest.mark.parametrize("reloaded", [False, True])
def test_an_adapter_where_a_transform_is_folded_is_refused(
    dit_folder, dit_statistics, run_dit, tmp_path, target, reloaded
):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    dq.quantize(pipe, dq.DQConfig("htg", groups=3), statistics=dit_statistics, progress=False)
    if reloaded:
        pipe.save_pretrained(tmp_path)
        pipe = DiTPipeline.from_pretrained(tmp_path)
    model = pipe.transformer
    before = run_dit(model)
    inject_adapter_in_model(lora(targets=[target]), model)
    for twin in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=FOLDED):
            run_dit(twin)
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_base_layer"):
            model.set_submodule(name, module.get_base_layer())
    assert torch.equal(run_dit(model), before)


def test_diffusers_loader_refuses_before_anything_changes(flux, loras, run_flux, flux_call):
    pipe = flux()
    config = dq.DQConfig("smoothquant", weight_bits=8)
    dq.quantize(pipe, config, calls=[flux_call], num_inference_steps=4, progress=False)
    model = pipe.transformer
    before, names = run_flux(model), [name for name, _ in model.named_modules()]
    for _ in range(2):
        with pytest.raises(
            ValueError, match="method 'smoothquant' has folded .* reads an input that another layer has"
        ):
            pipe.load_lora_weights(loras())
        with pytest.raises(ValueError, match="method 'smoothquant' has folded"):
            model.add_adapter(lora())
        assert [name for name, _ in model.named_modules()] == names
        assert torch.equal(run_flux(model), before) and not hasattr(model, "peft_config")
    model.add_adapter(lora(targets=["ff.net.2"]))  # nothing upstream of a GELU can carry a transform
    kept = run_flux(model)
    assert not torch.equal(kept, before)
    with pytest.raises(ValueError, match="method 'smoothquant' has folded"):
        model.add_adapter(lora(1), "other")
    assert torch.equal(run_flux(model), kept) and set(model.peft_config) == {"default"}
    model.unload_lora()
    assert torch.equal(run_flux(model), before)


@pytest.mark.parametrize(
    "config", [lora(use_dora=True), OFTConfig(target_modules=["to_q"], r=2, oft_block_size=0)], ids=["dora", "oft"]
)
def test_adapters_that_read_the_weight_are_refused(flux, run_flux, config):
    pipe = flux("rtn")
    before = run_flux(pipe.transformer)
    with pytest.raises(ValueError, match="which computes with the weight of the layer.*LoRA without DoRA"):
        pipe.transformer.add_adapter(config)
    assert torch.equal(run_flux(pipe.transformer), before)


def test_lokr_works(flux, run_flux):
    full, quantized = flux(), flux("rtn")
    error, before = difference(run_flux, quantized, full), run_flux(full.transformer)
    for pipe in (full, quantized):
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoKrConfig(r=4, alpha=8, target_modules=["to_q"], init_weights=False))
    assert difference(run_flux, quantized, full) < 2 * error < float((run_flux(full.transformer) - before).norm())


def test_fusing_is_refused_and_what_is_not_quantized_may_be_fused(flux, loras, run_flux):
    pipe = flux("rtn")
    pipe.load_lora_weights(loras())
    before = run_flux(pipe.transformer)
    with pytest.raises(
        ValueError, match=r"fuse_lora cannot add .* rounded weight of .*unload_lora_weights\(\)\) and quant"
    ):
        pipe.fuse_lora()
    assert torch.equal(run_flux(pipe.transformer), before)
    pipe.unload_lora_weights()
    pipe.transformer.add_adapter(lora(targets=["x_embedder"]))
    beside = run_flux(pipe.transformer)
    pipe.transformer.fuse_lora()
    torch.testing.assert_close(run_flux(pipe.transformer), beside, rtol=0, atol=5e-2 * float(beside.abs().max()))


def test_fused_before_quantizing_is_the_way(flux, loras, run_flux):
    pipe, reference = flux(), flux()
    for each in (pipe, reference):
        each.load_lora_weights(loras())
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    plain = flux("rtn")
    dq.quantize(pipe, dq.DQConfig("rtn"), progress=False)
    assert difference(run_flux, pipe, reference) < difference(run_flux, plain, reference) / 4


def test_a_model_with_an_adapter_is_not_saved_and_the_adapter_is(flux, loras, run_flux, tmp_path):
    pipe = flux("rtn")
    without = run_flux(pipe.transformer)
    folder = loras()
    pipe.load_lora_weights(folder, adapter_name="style")
    with_lora = run_flux(pipe.transformer)
    with pytest.raises(ValueError, match="an adapter is loaded .*unload it"):
        pipe.transformer.save_pretrained(tmp_path / "model")
    pipe.transformer.save_lora_adapter(tmp_path / "adapter", adapter_name="style")
    saved = load_file(tmp_path / "adapter" / FILE)
    original = load_file(f"{folder}/{FILE}")
    assert {f"transformer.{name}" for name in saved} == set(original)
    pipe.unload_lora_weights()
    pipe.transformer.save_pretrained(tmp_path / "model")
    pipe.transformer = FluxTransformer2DModel.from_pretrained(tmp_path / "model")
    assert torch.equal(run_flux(pipe.transformer), without)
    pipe.load_lora_weights(folder)
    assert torch.equal(run_flux(pipe.transformer), with_lora)


def test_dequantizing_keeps_the_adapter(flux, loras, run_flux):
    pipe = flux("rtn")
    pipe.load_lora_weights(loras())
    before = run_flux(pipe.transformer)
    pipe.transformer.dequantize()
    assert not [m for m in pipe.transformer.modules() if isinstance(m, QuantizedLinear)]
    # the inputs are not rounded any more
    torch.testing.assert_close(run_flux(pipe.transformer), before, rtol=0, atol=5e-2 * float(before.abs().max()))
    pipe.fuse_lora()


def test_guards_do_not_keep_the_model_alive(flux):
    pipe = flux("rtn")
    freed = weakref.ref(pipe.transformer)
    gc.disable()
    try:
        pipe.transformer = None
        assert freed() is None
    finally:
        gc.enable()


def test_a_shallow_copy_is_guarded_itself(flux):
    model = flux("rtn").transformer
    twin = copy.copy(model)
    assert twin.to("cpu") is twin
    with pytest.raises(ValueError, match="cannot be cast"):
        twin.to(torch.zeros(1, dtype=torch.float64))


def test_guards_are_of_quantized_models_alone(flux):
    model, plain = flux("rtn").transformer, flux().transformer
    with pytest.raises(ValueError, match="cannot be cast"):
        model.to(torch.float64)
    assert plain.to(torch.float64).dtype == torch.float64, "of the same class"
    kind = type(model)
    assert kind in [FluxTransformer2DModel] and kind not in [DiTTransformer2DModel], "as from_pipe looks"
    assert (kind.__name__, kind.__module__) == ("FluxTransformer2DModel", FluxTransformer2DModel.__module__)
    assert FluxTransformer2DModel.save_pretrained is ModelMixin.save_pretrained, "diffusers' own class is as it was"
    model.dequantize()
    assert type(model) is FluxTransformer2DModel
    assert model.to(torch.float64).dtype == torch.float64


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_adapters_of_an_offloaded_pipeline(flux, loras, run_flux, kind):
    place = torch.device("cpu")
    expected, pipe = flux("rtn"), flux("rtn")
    pipe.transformer.enable_group_offload(place, torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)
    before = run_flux(expected.transformer)
    assert torch.equal(run_flux(pipe.transformer), before)
    folder = loras()
    for each in (expected, pipe):
        each.load_lora_weights(folder)
    assert torch.equal(run_flux(pipe.transformer), run_flux(expected.transformer))
    pipe.unload_lora_weights()
    assert torch.equal(run_flux(pipe.transformer), before)
