# SPDX-License-Identifier: Apache-2.0
"""The bars that quality and size have to clear, on trained weights. `pytest tests/test_quality.py -s` prints figures.

16 images, guidance 1.5, the same seeds; calibrated on 32 other images. PSNR is to the full-precision images.
"""

import copy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler
from support import tiny_pipeline

import diffusers_dq as dq
from diffusers_dq.denoise import run_call
from diffusers_dq.evaluation import inject_outliers, psnr

MODEL = Path(__file__).parent.parent / "examples" / "dit-cifar10"
IMAGES = dict(class_labels=[i % 10 for i in range(16)], guidance_scale=1.5)
CALLS = [dict(class_labels=[i % 10 for i in range(32)], guidance_scale=1.5)]
RTN = dict(method="rtn", dynamic=False)
HTG = dict(method="htg")


def load(outliers: bool = False) -> DiTPipeline:
    pipe = DiTPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    if outliers:
        inject_outliers(pipe.transformer)
    return pipe


def images(pipe: DiTPipeline, steps: int) -> torch.Tensor:
    return torch.from_numpy(run_call(pipe, IMAGES, num_inference_steps=steps, seed=1234, output_type="np"))


class Measured(NamedTuple):
    psnr: float
    nbytes: int


class Case:
    """The model, its images and statistics at a number of steps."""

    def __init__(self, steps: int, outliers: bool) -> None:
        self.steps, self.outliers = steps, outliers
        self._measured: dict[str, Measured] = {}
        pipe = load(outliers)
        self.reference = images(pipe, steps)
        self.statistics = dq.calibrate(
            pipe, CALLS, num_inference_steps=steps, seed=77, second_moments=True, progress=False
        )

    def images(self, **config: object) -> torch.Tensor:
        pipe = load(self.outliers)
        dq.quantize(pipe, dq.DQConfig(**config), statistics=self.statistics, progress=False)
        return images(pipe, self.steps)

    def measured(self, **config: object) -> "Measured":
        """Once for each configuration."""
        key = repr(config)
        if key not in self._measured:
            self._measured[key] = self._measure(config)
        return self._measured[key]

    def _measure(self, config: dict[str, object]) -> "Measured":
        pipe = load(self.outliers)
        report = dq.quantize(pipe, dq.DQConfig(**config), statistics=self.statistics, progress=False)
        value = float(psnr(self.reference, images(pipe, self.steps)).mean())
        found = Measured(value, sum(row.nbytes for row in report.linears))
        print(f"\n{self.steps} steps{', outliers' if self.outliers else ''}: {config} {found}")
        return found

    def psnr(self, **config: object) -> float:
        return self.measured(**config).psnr


@pytest.fixture(scope="module", params=[25, 50])
def plain(request):
    return Case(request.param, outliers=False)


@pytest.fixture(scope="module", params=[25, 50])
def hard(request):
    return Case(request.param, outliers=True)


@pytest.mark.slow
def test_without_rounding_the_images_are_those_of_full_precision(plain):
    difference = (plain.images(**HTG, weight_bits=16, activation_bits=16) - plain.reference).abs().max()
    print(f"\n{plain.steps} steps, W16A16: largest difference {difference:.1e}")
    assert difference < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "gain"), [(dict(method="rtn"), 5), (HTG, 2), (dict(method="qdit", group_size=32), 4)], ids=str
)
def test_gptq_serves_every_method(plain, config, gain):
    """Seen at 25 steps: 7.4, 3.1 and 6.2 dB."""
    nearest = plain.psnr(**config, weight_bits=4)
    assert plain.psnr(**config, weight_bits=4, rounding="gptq") >= nearest + gain


@pytest.mark.slow
def test_htg_on_the_trained_model(plain):
    assert plain.psnr(**HTG, weight_bits=8) >= 47  # the bar is 40; 49.6 and 50.7 were reached
    assert plain.psnr(**HTG, weight_bits=4) >= plain.psnr(**RTN, weight_bits=4) + 2


@pytest.mark.slow
def test_what_was_calibrated_serves_another_scheduler_and_number_of_steps(plain):
    def dpm(pipe: DiTPipeline) -> torch.Tensor:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        return images(pipe, 20)

    pipe = load()
    reference = dpm(pipe)
    dq.quantize(pipe, dq.DQConfig(**HTG), statistics=plain.statistics, progress=False)
    value = float(psnr(reference, dpm(pipe)).mean())
    print(f"\ncalibrated at {plain.steps} DDIM steps, 20 DPM-Solver steps: W8A8 {value:.2f} dB")
    assert value >= 45  # 40 is the bar with the calibrated schedule itself


@pytest.mark.slow
def test_htg_with_outliers(hard):
    assert hard.psnr(**HTG, weight_bits=8) >= hard.psnr(**RTN, weight_bits=8) + 12
    assert hard.psnr(**HTG, weight_bits=4) >= hard.psnr(**RTN, weight_bits=4) + 5


NOT_LEARNED = ["smoothquant", "quarot", "ptq4dm", "ptqd", "repq", "htg", "viditq"]  # in seconds; tables has the rest


@pytest.mark.slow
@pytest.mark.parametrize("method", NOT_LEARNED)
def test_with_outliers_a_preset_of_the_same_size_leads_a_paper_by_three_decibels(hard, method):
    """W4A8, files within 5 percent. QuaRot with GPTQ is the closest: seen 5 to 6 dB behind."""
    ours, paper = (
        hard.measured(weight_bits=4, **config)
        for config in (dict(preset="balanced"), dict(method=method, preset="paper"))
    )
    assert ours.nbytes <= 1.05 * paper.nbytes
    assert ours.psnr >= paper.psnr + 3


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_presets_are_ordered_as_their_names_say(hard, bits):
    quality, balanced, speed, rtn = (
        hard.psnr(**config, weight_bits=bits)
        for config in (*(dict(preset=name) for name in ("quality", "balanced", "speed")), dict(method="rtn"))
    )
    assert quality > balanced - 1 and balanced > speed > rtn  # at 8 bits quality and balanced are both lossless


def test_injected_outliers_do_not_change_the_function():
    pipe = tiny_pipeline()
    model, changed = pipe.transformer.double(), copy.deepcopy(pipe.transformer)
    inject_outliers(changed)
    assert (
        changed.transformer_blocks[0].attn1.to_q.weight / model.transformer_blocks[0].attn1.to_q.weight
    ).min() < 0.1
    inputs = dict(
        hidden_states=torch.randn(1, 4, 8, 8, dtype=torch.float64),
        timestep=torch.tensor([5]),
        class_labels=torch.tensor([1]),
    )
    with torch.no_grad():
        # scales of 40 in fp64
        assert torch.allclose(model(**inputs).sample, changed(**inputs).sample, rtol=1e-10, atol=1e-10)


def stored_bytes(model, folder: Path) -> int:
    """Of the weights file, without the timestep and class embedders."""
    model.save_pretrained(folder)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    embedders = {id(t): t for name, t in model.state_dict(keep_vars=True).items() if ".emb." in name}
    return total - sum(tensor.nbytes for tensor in embedders.values())


@pytest.mark.slow
@pytest.mark.parametrize("weight_bits, bar", [(8, 0.60), (4, 0.36)])
def test_size_of_the_demo_models_file(weight_bits, bar, tmp_path):
    pipe = DiTPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16)
    statistics = dq.calibrate(pipe, CALLS, num_inference_steps=50, progress=False)
    full = stored_bytes(pipe.transformer, tmp_path / "full")
    dq.quantize(pipe, dq.DQConfig(**HTG, weight_bits=weight_bits), statistics=statistics, progress=False)
    ratio = stored_bytes(pipe.transformer, tmp_path / "quantized") / full
    print(f"\ndemo model, 50 steps, W{weight_bits}A8: {ratio:.3f} of bf16")
    assert ratio <= bar


@pytest.mark.slow
@pytest.mark.parametrize("weight_bits, bar", [(8, 0.54), (4, 0.29)])
def test_size_at_the_width_of_dit_xl(weight_bits, bar, tmp_path):
    # 8 blocks of 28: the output layers, in bf16, weigh more here than in the real model
    pipe = tiny_pipeline(num_attention_heads=16, attention_head_dim=72, num_layers=8)
    pipe.to(torch.bfloat16)
    statistics = dq.calibrate(pipe, [dict(class_labels=[1])], num_inference_steps=10, progress=False)
    full = stored_bytes(pipe.transformer, tmp_path / "full")
    config = dq.DQConfig(**HTG, weight_bits=weight_bits, groups=10, search="minmax")
    dq.quantize(pipe, config, statistics=statistics, progress=False)
    ratio = stored_bytes(pipe.transformer, tmp_path / "quantized") / full
    print(f"\nwidth 1152, 10 groups, W{weight_bits}A8: {ratio:.3f} of bf16")
    assert ratio <= bar
