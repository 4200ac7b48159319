# SPDX-License-Identifier: Apache-2.0
import copy
import gc
import threading

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
        assert cache.nbytes == 4 * 2 * 5 * 32 * 4, "K and V in two blocks, batch, tokens, channels of four bytes"
        del inputs
        gc.collect()
        assert cache.nbytes == 0


def many_prompts(count):
    tiny = MODELS["PixArtTransformer2DModel"]
    inputs = dict(tiny.inputs(500, torch.Generator().manual_seed(2)))
    return [inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"] + i} for i in range(count)]


def test_of_more_prompts_the_last_are_kept_and_it_is_said(caplog):
    model = MODELS["PixArtTransformer2DModel"].build()
    prompts = many_prompts(3)
    with torch.no_grad(), dq.cache_text(model, prompts=2) as cache:
        one = None
        for inputs in prompts:
            model(**inputs)
            one = one or cache.nbytes
        assert cache.nbytes == 2 * one and "more than 2 prompts in turn" in caplog.text
    with pytest.raises(ValueError, match="prompts must be at least 1"):
        dq.cache_text(model, prompts=0)


def test_threads_do_not_mix_prompts():
    model = MODELS["PixArtTransformer2DModel"].build()
    prompts = many_prompts(4)
    with torch.no_grad():
        expected = [model(**inputs).sample for inputs in prompts]
    wrong = []

    def run(i):
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(**prompts[i]).sample, expected[i]):
                    wrong.append(i)

    with dq.cache_text(model, prompts=4):
        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_of_two_arguments_one_of_inference_mode_switches_it_off(caplog):
    """HunyuanDiT's text and mask, or Wan's text and picture: the other alone does not tell prompts apart."""
    tiny = next(tiny for tiny in DESCRIBED.values() if len(spec_of(tiny.build()).text.arguments) > 1)
    model = tiny.build()
    inputs = dict(tiny.inputs(tiny.timesteps[1], torch.Generator().manual_seed(2)))
    name = next(n for n in spec_of(model).text.arguments if getattr(inputs[n], "is_floating_point", lambda: False)())
    with torch.inference_mode():
        texts = [inputs[name] + i for i in range(2)]
    with torch.no_grad():
        expected = [model(**inputs | {name: text}, return_dict=False)[0] for text in texts]
        with dq.cache_text(model) as cache:
            for text, output in zip(texts, expected, strict=True):
                assert torch.equal(model(**inputs | {name: text}, return_dict=False)[0], output)
            assert cache.nbytes == 0 and "inference_mode" in caplog.text


def test_a_changed_weight_and_a_copy_are_noticed():
    tiny = MODELS["PixArtTransformer2DModel"]
    model = tiny.build()
    inputs = tiny.inputs(500, torch.Generator().manual_seed(2))
    with torch.no_grad(), dq.cache_text(model) as cache:
        before = model(**inputs).sample
        twin = copy.deepcopy(model)
        twin.transformer_blocks[0].attn2.to_v.weight.mul_(2)
        assert not torch.equal(twin(**inputs).sample, before) and torch.equal(model(**inputs).sample, before)
        assert cache.nbytes, "the twin's cache is its own"
        model.transformer_blocks[0].attn2.to_v.weight.mul_(2)
        assert torch.equal(model(**inputs).sample, twin(**inputs).sample)


def test_hooks_that_were_put_over_it_stay_when_it_goes():
    from accelerate.hooks import ModelHook, add_hook_to_module

    tiny = MODELS["PixArtTransformer2DModel"]
    model = tiny.build()
    inputs = tiny.inputs(500, torch.Generator().manual_seed(2))
    linear = model.transformer_blocks[0].attn2.to_k
    calls = []

    class Counts(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    with torch.no_grad():
        expected = model(**inputs).sample
        with dq.cache_text(model):
            add_hook_to_module(linear, Counts())
            assert torch.equal(model(**inputs).sample, expected)
        assert torch.equal(model(**inputs).sample, expected) and calls == [linear, linear]
    assert "forward" not in vars(model.transformer_blocks[1].attn2.to_k)


def test_with_gradients_and_where_dynamo_traces_everything_is_computed():
    tiny = MODELS["PixArtTransformer2DModel"]
    model = tiny.build()
    inputs = tiny.inputs(500, torch.Generator().manual_seed(2))
    with dq.cache_text(model) as cache:
        for _ in range(2):
            model(**inputs).sample.sum().backward()
        with torch.no_grad():
            expected = model(**inputs).sample
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            assert torch.equal(compiled(**inputs).sample, expected)
        assert cache.nbytes


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
