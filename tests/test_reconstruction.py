# SPDX-License-Identifier: Apache-2.0
import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline
from support import CALLS, PIXART_CALL, tiny_dit, tiny_pipeline, tiny_pixart, tiny_pixart_pipeline

import diffusers_dq as dq
from diffusers_dq.conversion import Conversion
from diffusers_dq.reconstruction import Reconstructor
from diffusers_dq.replay import units_of

ADAROUND = dict(weight_bits=4, rounding="adaround", reconstruction=dict(iterations=40))


def quantized(folder, statistics, checkpoint=None, **config):
    pipe = DiTPipeline.from_pretrained(folder)
    config = dq.DQConfig(**{"method": "ptq4dit", **ADAROUND, **config})
    dq.quantize(pipe, config, statistics=statistics, progress=False, checkpoint=checkpoint)
    return pipe.transformer


def test_units_are_blocks_or_linears():
    model = tiny_dit()
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    inside = [name for name in linears if name.startswith("transformer_blocks.")]
    assert list(units_of(model, inside, "block")) == ["transformer_blocks.0", "transformer_blocks.1"]
    assert units_of(model, ["proj_out_1"], "block") == {"proj_out_1": ["proj_out_1"]}
    assert list(units_of(tiny_pixart(), ["adaln_single.linear"], "block")) == ["adaln_single.linear"]
    assert all(names == [unit] for unit, names in units_of(model, inside, "layer").items())


@pytest.mark.parametrize(
    "config",
    [
        dict(method="ptq4dit"),
        dict(method="htg", groups=2),
        dict(method="viditq"),
        dict(method="qdit", group_size=32),
        dict(method="rtn", activation_bits=16),
        dict(method="ptq4dit", reconstruction=dict(iterations=20, unit="layer")),
    ],
    ids=str,
)
@torch.no_grad()
def test_learned_rounding_leaves_less_error_in_the_model(config, dit_folder, dit_statistics, run_dit):
    """On timesteps between the calibrated ones. The weights are random, so gains are small; seen: 2 to 30 percent."""
    full = run_dit(DiTPipeline.from_pretrained(dit_folder).transformer)
    errors = {
        rounding: (run_dit(quantized(dit_folder, dit_statistics, **config, rounding=rounding)) - full).norm()
        for rounding in ("nearest", "adaround")
    }
    print(f"\n{config}: {errors['adaround'] / errors['nearest']:.3f} of nearest's")
    assert errors["adaround"] < errors["nearest"]


def test_an_interrupted_run_resumes_to_the_same_weights(dit_folder, dit_statistics, tmp_path, monkeypatch):
    whole = quantized(dit_folder, dit_statistics).state_dict()
    pipe = DiTPipeline.from_pretrained(dit_folder)
    before = copy.deepcopy(pipe.transformer.state_dict())
    learn = Reconstructor._learn

    def interrupted(self, unit, *args):
        if unit == "transformer_blocks.1":
            raise KeyboardInterrupt
        learn(self, unit, *args)

    config = dq.DQConfig("ptq4dit", **ADAROUND)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Reconstructor, "_learn", interrupted)
        dq.quantize(pipe, config, statistics=dit_statistics, progress=False, checkpoint=tmp_path / "c")
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)

    learned = []
    monkeypatch.setattr(
        Reconstructor, "_learn", lambda self, unit, *args: (learned.append(unit), learn(self, unit, *args))
    )
    dq.quantize(pipe, config, statistics=dit_statistics, progress=False, checkpoint=tmp_path / "c")
    assert learned == ["transformer_blocks.1"]
    resumed = pipe.transformer.state_dict()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    with pytest.raises(ValueError, match="of another run: config"):
        quantized(dit_folder, dit_statistics, tmp_path / "c", weight_bits=8)


def test_a_damaged_checkpoint_is_refused(dit_folder, dit_statistics, tmp_path):
    (tmp_path / "c").write_bytes(b"not a file")
    with pytest.raises(ValueError, match="is damaged"):
        quantized(dit_folder, dit_statistics, tmp_path / "c")


def test_without_samples_it_says_what_to_do(dit_folder):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    statistics = dq.calibrate(pipe, CALLS, num_inference_steps=4, samples=0, progress=False)
    with pytest.raises(ValueError, match="calibrate with samples=32"):
        quantized(dit_folder, statistics)


def test_text_models_and_their_odd_arguments_are_learned_too():
    pipe = tiny_pixart_pipeline()
    statistics = dq.calibrate(pipe, [PIXART_CALL], num_inference_steps=4, samples=4, progress=False)
    dq.quantize(pipe, dq.DQConfig("rtn", **ADAROUND), statistics=statistics, progress=False)
    assert dq.inspect(pipe).linears


@pytest.mark.parametrize("settings", [dict(iterations=0), dict(warmup=1.0), dict(unit="model")])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match="at least 1 iteration|unit must be"):
        dq.DQConfig("rtn", reconstruction=settings)
    with pytest.raises(TypeError, match="reconstruction has no epochs; it may set unit, iterations"):
        dq.DQConfig("rtn", reconstruction=dict(epochs=3))


@torch.no_grad()
def test_a_linear_learns_what_others_ask_it_to_emit(dit_folder, dit_statistics):
    """norm1.linear and to_v carry folds: their targets are the folded layers' outputs, not the model's own."""
    model = DiTPipeline.from_pretrained(dit_folder).transformer
    config = dq.DQConfig("htg", groups=2, rounding="adaround", weight_bits=4, reconstruction=dict(unit="layer"))
    conversion = Conversion(model, config, dit_statistics, torch.float32)
    reconstructor = Reconstructor(
        model,
        conversion.plan,
        conversion._built,
        conversion.modulations_of,
        conversion._replay(),
        config.reconstruction_settings(),
        identity={},
    )
    for unit in ("transformer_blocks.0.norm1.linear", "transformer_blocks.1.attn1.to_v"):
        plan = replace(conversion.plan.linears[unit], weight_scheme=None, scheme=None, online=True, input_range=None)
        exact = conversion._built(unit, model.get_submodule(unit), plan)
        for passage in reconstructor._passages(unit, {}):
            reconstructor.replay.select(passage.timestep)
            # what the layer emits without rounding, its own input transformed online; fp32 tables
            assert torch.allclose(exact(*passage.args), reconstructor._wanted(unit, passage)[0], rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_other_weights_is_refused(dit_folder, dit_statistics, tmp_path):
    quantized(dit_folder, dit_statistics, tmp_path / "c")
    pipe = tiny_pipeline(seed=1)
    statistics = dq.calibrate(pipe, CALLS, num_inference_steps=10, second_moments=True, progress=False)
    statistics = replace(statistics, about=dit_statistics.about)  # nothing but the weights differs
    with pytest.raises(ValueError, match="of another run: statistics differ"):
        dq.quantize(
            pipe, dq.DQConfig("ptq4dit", **ADAROUND), statistics=statistics, progress=False, checkpoint=tmp_path / "c"
        )
