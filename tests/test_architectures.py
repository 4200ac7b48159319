# SPDX-License-Identifier: Apache-2.0
"""Every transformer of diffusers that denoises: what calibration discovers agrees with the spec where there is one,
and makes a working, exact model where there is none."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import nullcontext

import diffusers
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from tiny_models import MODELS, TinyModel
from tiny_models.fp64 import all_in_fp64
from torch import Tensor, nn

import diffusers_dq as dq
from diffusers_dq.calibration import _Recorder
from diffusers_dq.denoise import TimestepArgument, argument_names, watching_timestep
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.replay import Replay, blocks_of
from diffusers_dq.specs import SPECS, spec_of
from diffusers_dq.timesteps import TimestepGroups

UNDESCRIBED = {name: tiny for name, tiny in MODELS.items() if SPECS.get(tiny.cls) is None}
DESCRIBED = {name: tiny for name, tiny in MODELS.items() if SPECS.get(tiny.cls) is not None}

_UNET = "a UNet: convolutions do most of its work"
_CONTROL = "a controlnet: it adds to what a transformer computes and predicts no noise"
_PART = "a part of a UNet's block, not a denoiser of its own"
_EXCLUDED = {
    "AudioLDM2UNet2DConditionModel": _UNET,
    "DreamLiteUNetModel": _UNET,
    "I2VGenXLUNet": _UNET,
    "Kandinsky3UNet": _UNET,
    "StableCascadeUNet": _UNET,
    "UNet1DModel": _UNET,
    "UNet2DConditionModel": _UNET,
    "UNet2DModel": _UNET,
    "UNet3DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
    "UNetSpatioTemporalConditionModel": _UNET,
    "ControlNetModel": _CONTROL,
    "ControlNetUnionModel": _CONTROL,
    "CosmosControlNetModel": _CONTROL,
    "FluxControlNetModel": _CONTROL,
    "FluxMultiControlNetModel": _CONTROL,
    "HunyuanDiT2DControlNetModel": _CONTROL,
    "HunyuanDiT2DMultiControlNetModel": _CONTROL,
    "MultiControlNetModel": _CONTROL,
    "QwenImageControlNetModel": _CONTROL,
    "QwenImageMultiControlNetModel": _CONTROL,
    "SD3ControlNetModel": _CONTROL,
    "SD3MultiControlNetModel": _CONTROL,
    "SanaControlNetModel": _CONTROL,
    "SparseControlNetModel": _CONTROL,
    "UNetControlNetXSModel": _UNET,
    "ZImageControlNetModel": _CONTROL,
    "DreamLiteTransformer2DModel": _PART,
    "Transformer2DModel": f"{_PART}; checkpoints of DiT and PixArt that name it are loaded as those classes",
    "TransformerTemporalModel": _PART,
    "LongCatAudioDiTVae": "an autoencoder",
    "PriorTransformer": "a prior: it denoises one image embedding for a UNet to decode",
    "T5FilmDecoder": "spectrograms from notes, of a pipeline that diffusers no longer maintains",
    "UniDiffuserModel": "two timesteps for two modalities, of a pipeline that diffusers no longer maintains",
}


_NOT_KEPT = {"WanAnimate2Transformer3DModel"}  # it is called with a cache, an object that no file can hold


def _candidates() -> Iterator[str]:
    """Models that diffusers exports and that are called a transformer or a DiT, or are told a time."""
    for name in dir(diffusers):
        cls = getattr(diffusers, name)
        if isinstance(cls, type) and issubclass(cls, ModelMixin) and cls is not ModelMixin:
            arguments = inspect.signature(cls.forward).parameters
            told = any(argument == "t" or "time" in argument for argument in arguments)
            if told or "Transformer" in name or "DiT" in name:
                yield name


def test_every_transformer_that_diffusers_exports_is_tested_or_left_out_for_a_reason():
    known = {tiny.cls for tiny in MODELS.values() if tiny.library is diffusers}
    candidates = set(_candidates())
    new = sorted(candidates - known - _EXCLUDED.keys())
    assert not new, f"new in diffusers {diffusers.__version__}: {new}. Add a tiny model, or a reason to _EXCLUDED"
    gone = sorted((known | _EXCLUDED.keys()) - candidates)
    assert not gone, f"no longer in diffusers {diffusers.__version__}: {gone}. Drop what is there for them"
    assert not known & _EXCLUDED.keys()


@pytest.fixture(params=UNDESCRIBED.values(), ids=UNDESCRIBED)
def undescribed(request) -> TinyModel:
    return request.param


@pytest.fixture(params=DESCRIBED.values(), ids=DESCRIBED)
def described(request) -> TinyModel:
    return request.param


def calibrated(model: nn.Module, tiny: TinyModel) -> dq.Statistics:
    """What `dq.calibrate` would return of one call with the model's three timesteps."""
    recorder = _Recorder(model, seed=0)
    with recorder.attached():
        for timestep in tiny.timesteps:
            tiny.run(model, timestep)
    recorder.check_finite()
    return recorder.statistics({"model_class": type(model).__name__, "calls_done": 1})


def outputs(model: nn.Module, tiny: TinyModel) -> list[Tensor]:
    return [tiny.run(model, timestep) for timestep in tiny.timesteps]


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert theirs.std() > 0 and torch.isfinite(theirs).all()
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_discovered_transforms_are_exact(undescribed, dtype, tolerance):
    """A shift a timestep group and a scale on every group of linears that calibration finds; nothing is rounded.

    fp64 keeps 16 digits, fp32 7: a few blocks of products of small widths lose one or two.
    """
    with all_in_fp64() if dtype == torch.float64 else nullcontext():
        model = undescribed.build(dtype)
        expected = outputs(model, undescribed)
        assert all(output.dtype == dtype for output in expected)
        statistics = calibrated(model, undescribed)
        assert len(statistics.timesteps) == 3
        assert statistics.descending == (undescribed.timesteps[0] > undescribed.timesteps[-1])
        config = dq.DQConfig("htg", weight_bits=16, activation_bits=16, groups=3, online=True)
        dq.quantize(model, config, statistics=statistics, progress=False)
        layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        assert layers and all(layer.layout.bias_groups == 3 and layer.layout.shift_groups == 3 for layer in layers)
        assert_equal(outputs(model, undescribed), expected, tolerance)
        selected = []
        for timestep in sorted(undescribed.timesteps):
            undescribed.run(model, timestep)
            selected.append(int(model.timestep_groups.index.max()))
        assert selected == [0, 1, 2]


def test_eight_bits_work_and_are_saved_and_loaded(undescribed, tmp_path):
    model = undescribed.build()
    model.save_pretrained(tmp_path / "full")
    expected = outputs(model, undescribed)
    report = dq.quantize(model, dq.DQConfig("rtn"), progress=False)
    assert report.quantized
    ours = outputs(model, undescribed)
    assert_equal(ours, expected, 0.1)  # half a percent a linear; at 4 bits it would be ten times that
    assert any(not torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    model.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized")
    while_loading = type(model).from_pretrained(tmp_path / "full", quantization_config=dq.DQConfig("rtn"))
    for other in (again, while_loading):
        assert all(torch.equal(a, b) for a, b in zip(outputs(other, undescribed), ours, strict=True))


def test_embedders_and_what_is_outside_of_blocks_stay_in_full_precision(undescribed):
    model = undescribed.build()
    inside = [f"{block}." for block in blocks_of(model)]
    for group in spec_of(model).groups:
        for name in group.linears:
            parts = name.split(".")
            assert name.startswith(tuple(inside)) or "pair_update_layers" in parts, name
    report = dq.quantize(model, dq.DQConfig("rtn"), progress=False)
    embedders = [row.name for row in report.quantized if "emb" in row.name]
    assert not embedders


def test_what_embeds_the_timestep_stays_in_full_precision():
    """Models read the dtype of its weights, to cast the timestep to."""
    for tiny in MODELS.values():
        report = dq.quantize(tiny.build(), dq.DQConfig("rtn"), progress=False)
        assert report.quantized
        wrong = [row.name for row in report.quantized if "time" in row.name or "t_embed" in row.name]
        assert not wrong, tiny.name


@pytest.mark.parametrize(
    "tiny", [tiny for tiny in MODELS.values() if tiny.name not in _NOT_KEPT], ids=lambda tiny: tiny.name
)
def test_what_calibration_keeps_of_inputs_repeats_the_forward(tiny, tmp_path):
    model = tiny.build()
    recorder = _Recorder(model, seed=0, kept={(0, 0), (0, 2)})
    with recorder.attached():
        expected = outputs(model, tiny)
    statistics = recorder.statistics({"model_class": tiny.cls, "calls_done": 1})
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = dq.Statistics.load(tmp_path / "statistics.safetensors")
    again = Replay(model, loaded, TimestepGroups(), [()]).outputs({})
    assert [float(t.amax() if loaded.descending else t.amin()) for t, _ in again] == pytest.approx(tiny.timesteps[::2])
    assert_equal([output for _, output in again], expected[::2], 1e-5)  # fp32 sums in another order


def test_discovery_agrees_with_the_spec(described, monkeypatch):
    """With the spec hidden, calibration finds its groups again, as far as the spec says anything of a linear.

    A spec may know more than which tensors are the same object: that two of them hold the same tokens (HunyuanVideo's
    single blocks take them apart and put them together again). Then what is found are parts of a group that were given
    the same numbers.
    """
    model = described.build()
    spec = spec_of(model)
    monkeypatch.delitem(SPECS._entries, described.cls)
    assert SPECS.get(described.cls) is None
    found = {name: site for site in calibrated(model, described).sites.values() for name in site.linears}
    of_spec = {name: set(group.linears) for group in spec.groups for name in group.linears}
    both = found.keys() & of_spec.keys()
    assert both
    for name in both:
        assert both & set(found[name].linears) <= of_spec[name], name
        assert len({found[other].linears for other in both & of_spec[name]}) <= 2, name
        for other in both & of_spec[name]:
            assert torch.equal(found[other].minimum, found[name].minimum), (name, other)
            assert torch.equal(found[other].maximum, found[name].maximum), (name, other)


def test_every_model_says_where_its_timestep_is():
    for tiny in MODELS.values():
        cls = getattr(tiny.library, tiny.cls)
        argument = TimestepArgument.of(cls.__new__(cls))
        inputs = tiny.inputs(tiny.timesteps[0], torch.Generator())
        value = torch.as_tensor(argument.read((), inputs)).float()
        noisiest = value.amax() if tiny.timesteps[0] > tiny.timesteps[-1] else value.amin()
        assert float(noisiest) == pytest.approx(tiny.timesteps[0]), tiny.name


class Doubling(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class OddBlock(nn.Module):
    """All that a block may do with linears and those of diffusers rarely do."""

    def __init__(self):
        super().__init__()
        for name in ("first", "by_keyword", "after_a_change", "twice", "unused", "expert"):
            self.add_module(name, nn.Linear(16, 16))
        self.special = Doubling(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        x = x * 1
        y = self.first(x) + self.by_keyword(input=x) + self.special(x)
        x += 1
        y = y + self.after_a_change(x) + self.twice(x) + self.twice(y)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return torch.cat([self.expert(y[:, :0]), self.expert(y)], 1)


class OddModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([OddBlock(), OddBlock()])

    def forward(self, hidden_states, sight_timesteps=None, sound_timesteps=None, return_dict=True):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return (hidden_states,)


def _odd_inputs(timestep: float, generator: torch.Generator) -> dict[str, Tensor]:
    return dict(hidden_states=torch.randn(1, 4, 16, generator=generator), sound_timesteps=torch.tensor([timestep]))


ODD = TinyModel("OddModel", {}, _odd_inputs, library=sys.modules[__name__])


def test_odd_uses_of_linears():
    model = ODD.build()
    expected = outputs(model, ODD)
    statistics = calibrated(model, ODD)
    first = {site.linears for name, site in statistics.sites.items() if name.startswith("blocks.0.")}
    groups = [("first", "by_keyword", "special"), ("after_a_change", "twice"), ("expert",)]
    assert first == {tuple(f"blocks.0.{name}" for name in group) for group in groups}
    config = dq.DQConfig("htg", weight_bits=16, activation_bits=16, groups=3, online=True)
    report = dq.quantize(model, config, statistics=statistics, progress=False)
    assert {name.removeprefix("blocks.0.") for name in report.kept if "blocks.0." in name} == {
        "special",
        "unused",
        "attention.out_proj",
    }
    assert_equal(outputs(model, ODD), expected, 1e-5)  # fp32, see above
    model = ODD.build()
    report = dq.quantize(model, dq.DQConfig("rtn"), progress=False)
    assert {name for name in report.kept if "blocks.0." in name} == {"blocks.0.special", "blocks.0.attention.out_proj"}
    assert_equal(outputs(model, ODD), expected, 0.1)


def test_a_linear_that_is_called_twice_is_seen_with_both_inputs():
    model = ODD.build()
    received = []
    model.blocks[0].twice.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    statistics = calibrated(model, ODD)
    site = statistics.input_of("blocks.0.twice")
    both = torch.cat(received, 1)
    assert len(received) == 6
    assert torch.equal(site.minimum.amin(0), both.amin((0, 1)))
    assert torch.equal(site.maximum.amax(0), both.amax((0, 1)))


@pytest.mark.parametrize("descending, noisiest", [(True, 0.8), (False, 0.3)])
def test_of_many_timesteps_the_noisiest_counts_in_either_direction(descending, noisiest):
    seen = []
    with watching_timestep(model := ODD.build(), seen.append, descending):
        model(torch.zeros(1, 4, 16), sound_timesteps=torch.tensor([0.3, 0.8, 0.5]))
    assert seen == pytest.approx([noisiest])


class Modal(nn.Module):
    def forward(self, x, sight_timesteps=None, sound_timesteps=None):
        return x


def test_of_several_modalities_the_first_that_has_noise_tells_the_timestep():
    argument = TimestepArgument.of(Modal())
    assert argument_names(Modal()) == ["x", "sight_timesteps", "sound_timesteps"]
    sight, sound, none = torch.tensor([3.0]), torch.tensor([5.0]), torch.empty(0)
    assert argument.read((), dict(sight_timesteps=sight, sound_timesteps=sound)) is sight
    assert argument.read((), dict(sight_timesteps=none, sound_timesteps=sound)) is sound
    assert argument.read((1, None, sound), {}) is sound
    assert argument.read((1,), dict(sight_timesteps=none)) is None
