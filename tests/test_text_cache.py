# SPDX-License-Identifier: Apache-2.0
import gc

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from support import PIXART_CALL, tiny_pipeline, tiny_pixart_pipeline
from tiny_models import MODELS

import diffusers_dq as dq
from diffusers_dq.specs import SPECS, spec_of

DESCRIBED = {
    name: tiny
    for name, tiny in MODELS.items()
    if SPECS.get(tiny.cls) is not None and spec_of(tiny.build()).text is not None
}


class Counter:
    """Of what a linear really computes."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...]) -> None:
        self.calls = 0
        for name in names:
            linear = model.get_submodule(name)
            linear.forward = self.counting(linear.forward)

    def counting(self, forward):
        def count(x):
            self.calls += 1
            return forward(x)

        return count


@pytest.mark.parametrize("tiny", DESCRIBED.values(), ids=DESCRIBED)
def test_the_outputs_are_the_same_and_text_is_projected_once(tiny):
    model = tiny.build()
    text = spec_of(model).text
    inputs = tiny.inputs(tiny.timesteps[0], torch.Generator().manual_seed(2))
    later = dict(tiny.inputs(tiny.timesteps[1], torch.Generator().manual_seed(3)))
    later |= {name: inputs[name] for name in text.arguments if name in inputs}
    with torch.no_grad():
        expected = [model(**each, return_dict=False)[0] for each in (inputs, later)]
        counter = Counter(model, text.linears)
        with dq.cache_text(model) as cache:
            assert cache.kept == list(text.linears) and not cache.left
            for each, output in zip((inputs, later), expected, strict=True):
                assert torch.equal(model(**each, return_dict=False)[0], output)
            assert counter.calls == len(text.linears)
        assert torch.equal(model(**later, return_dict=False)[0], expected[1])
        assert counter.calls == 2 * len(text.linears), "without the cache everything is computed again"


def test_a_pipeline_projects_each_prompt_once():
    pipe = tiny_pixart_pipeline()
    run = dict(PIXART_CALL, num_inference_steps=5, output_type="latent")
    expected = pipe(**run, generator=torch.manual_seed(0)).images
    counter = Counter(pipe.transformer, spec_of(pipe.transformer).text.linears)
    with dq.cache_text(pipe):
        assert torch.equal(pipe(**run, generator=torch.manual_seed(0)).images, expected)
    assert counter.calls == 4, "key and value in two blocks, guidance in one batch"


def test_another_text_and_a_changed_one_are_projected_anew():
    tiny = MODELS["PixArtTransformer2DModel"]
    model = tiny.build()
    inputs = dict(tiny.inputs(500, torch.Generator().manual_seed(2)))
    other = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"] + 1}
    with torch.no_grad():
        expected = [model(**each, return_dict=False)[0] for each in (inputs, other)]
        with dq.cache_text(model):
            found = [model(**each, return_dict=False)[0] for each in (inputs, other, inputs)]
            inputs["encoder_hidden_states"] += 1  # in place: the same object
            found.append(model(**inputs, return_dict=False)[0])
    for output, wanted in zip(found, [*expected, expected[0], expected[1]], strict=True):
        assert torch.equal(output, wanted)


def test_what_was_kept_goes_with_the_prompt():
    tiny = MODELS["PixArtTransformer2DModel"]
    model = tiny.build()
    with dq.cache_text(model) as cache, torch.no_grad():
        inputs = tiny.inputs(500, torch.Generator().manual_seed(2))
        model(**inputs)
        assert len(cache._prompts) == 1
        cache._current = None
        del inputs
        gc.collect()
        assert not cache._prompts


def test_tables_that_switch_are_left_and_said():
    pipe = tiny_pixart_pipeline()
    statistics = dq.calibrate(pipe, [PIXART_CALL], num_inference_steps=6, progress=False)
    config = dq.DQConfig("htg", groups=3, online=True, modules_to_not_convert=["proj_out"])
    dq.quantize(pipe, config, statistics=statistics, progress=False)
    run = dict(PIXART_CALL, num_inference_steps=5, output_type="latent")
    expected = pipe(**run, generator=torch.manual_seed(0)).images
    with dq.cache_text(pipe) as cache:
        assert not cache.kept and set(cache.left.values()) == {"it is rounded otherwise from step to step"}
        assert torch.equal(pipe(**run, generator=torch.manual_seed(0)).images, expected)


def test_adapters_come_and_go():
    tiny = MODELS["PixArtTransformer2DModel"]
    model = tiny.build()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["attn2.to_v"], init_lora_weights=False), model)
    layers = [module for module in model.modules() if hasattr(module, "set_adapter") and hasattr(module, "base_layer")]
    inputs = tiny.inputs(500, torch.Generator().manual_seed(2))
    with torch.no_grad(), dq.cache_text(model):
        adapted = model(**inputs).sample
        for layer in layers:
            layer.enable_adapters(False)
        assert not torch.equal(model(**inputs).sample, adapted), "nothing of the adapter may be kept"


def test_an_architecture_whose_text_changes_is_refused():
    with pytest.raises(ValueError, match="no projections that depend on the prompt alone"):
        dq.cache_text(tiny_pipeline())
