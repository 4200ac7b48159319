# SPDX-License-Identifier: Apache-2.0
"""What carries the change of a block's input where one modulation serves all blocks: PixArt stands for them."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from support import PIXART_CALL, rebuilt_with_chains, tiny_pixart_pipeline
from tiny_models import MODELS

import diffusers_dq as dq
from diffusers_dq.installation import Description
from diffusers_dq.modulation import ModulateArgument, Modulation, ModulationLayout, attach, detach
from diffusers_dq.replay import Replay
from diffusers_dq.specs import ModulatedNorm, spec_of
from diffusers_dq.timesteps import TimestepGroups
from diffusers_dq.transforms import Chain, Scale, Shift

PIXART = MODELS["PixArtTransformer2DModel"]
STATIC = dict(method="htg", groups=3)


@pytest.fixture(scope="module")
def statistics() -> dq.Statistics:
    pipe = tiny_pixart_pipeline()
    return dq.calibrate(pipe, [PIXART_CALL], num_inference_steps=8, samples=8, progress=False)


def modulations(model: torch.nn.Module) -> list[Modulation]:
    return [module for module in model.modules() if isinstance(module, Modulation)]


def some(groups: int = 2, channels: int = 12, **factory) -> tuple[Modulation, TimestepGroups]:
    index = TimestepGroups()
    layout = ModulationLayout(argument="y", channels=channels, offset_groups=groups)
    modulation = Modulation(layout, index, **factory)
    modulation.multiplier.copy_(torch.arange(1.0, channels + 1))
    modulation.offset.copy_(torch.arange(float(groups))[:, None].expand(-1, channels))
    return modulation, index


@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 4), (2, 5, 12), (2, 5, 3, 4)], ids=str)
def test_it_changes_a_flat_or_a_chunked_modulation_of_samples_and_tokens_alike(shape):
    modulation, index = some()
    y = torch.randn(shape)
    for group in (0, 1):
        index.index.fill_(group)
        expected = y.reshape(*shape[: -1 if shape[-1] == 12 else -2], 12) * torch.arange(1.0, 13) + group
        torch.testing.assert_close(modulation(y), expected.view(shape))  # one rounding less: a fused multiply-add


def test_tables_stay_in_fp32_whatever_the_model_is_cast_to():
    modulation, _ = some()
    modulation.offset += 1 / 3
    before = modulation.offset.clone()
    modulation.to(torch.bfloat16)
    assert torch.equal(modulation.offset, before)
    assert modulation(torch.ones(1, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_modulation_of_every_token_is_changed_in_pieces(monkeypatch):
    modulation, index = some(channels=12)
    index.index.fill_(1)
    for shape in ((3, 7, 12), (3, 7, 2, 6)):
        y = torch.randn(shape).bfloat16()
        whole = modulation(y)
        with monkeypatch.context() as patched:
            patched.setattr("diffusers_dq.modulation._AT_ONCE", 0)
            patched.setattr("diffusers_dq.modulation._PIECE", 5)
            assert torch.equal(modulation(y), whole) and modulation(y).dtype == torch.bfloat16


class Block(torch.nn.Module):
    def forward(self, x, y=None):
        return x + y


def test_the_argument_may_be_named_or_not_and_must_be_there():
    block, (modulation, _) = Block(), some(1)
    attach(block, modulation)
    x, y = torch.zeros(1, 12), torch.ones(1, 12)
    assert torch.equal(block(x, y), block(x, y=y)) and torch.equal(block(x, y), torch.arange(1.0, 13)[None])
    with pytest.raises(ValueError, match="without y"):
        block(x)
    with pytest.raises(ValueError, match="without y"):
        block(x, y=None)
    with pytest.raises(ValueError, match="has a y_modulation already"):
        attach(block, modulation)
    detach(block)
    assert torch.equal(block(x, y), y) and not modulations(block)
    with pytest.raises(ValueError, match="no argument z, it takes"):
        ModulateArgument(block, ModulationLayout(argument="z", channels=12, offset_groups=1))


@pytest.mark.parametrize(
    "field", [dict(channels=0), dict(offset_groups=True), dict(partition=-1), dict(argument="a b")]
)
def test_a_layout_that_nobody_wrote_is_refused(field):
    with pytest.raises(ValueError, match="modulation's"):
        ModulationLayout(**{**dict(argument="y", channels=1, offset_groups=1), **field})


def test_each_block_of_pixart_gets_one_that_switches_with_the_timestep(statistics):
    pipe = tiny_pixart_pipeline()
    report = dq.quantize(pipe, dq.DQConfig(**STATIC), statistics=statistics, progress=False)
    assert [m.layout.offset_groups for m in modulations(pipe.transformer)] == [3, 3]
    rows = [row for row in report.linears if row.bits == "-"]
    assert [row.groups for row in rows] == [3, 3] and all(row.nbytes == 4 * 4 * 6 * 32 for row in rows)
    assert not set(rows) & set(report.quantized) and not set(report.kept) & {row.name for row in rows}
    norm_readers = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj")
    for row in report.linears:
        if row.name.endswith(norm_readers):
            assert "online" not in row.reason, row
    groups = set()
    for timestep in PIXART.timesteps:
        PIXART.run(pipe.transformer, timestep)
        groups.add(tuple(pipe.transformer.timestep_groups.index.tolist()))
    assert len(groups) == 3


def test_a_fresh_process_makes_the_same_of_the_file(statistics, tmp_path):
    pipe = tiny_pixart_pipeline()
    dq.quantize(pipe, dq.DQConfig(**STATIC), statistics=statistics, progress=False)
    model = pipe.transformer
    expected = PIXART.run(model)
    model.save_pretrained(tmp_path / "model")
    torch.save(expected, tmp_path / "expected.pt")
    again = f"""
import sys; sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
import torch; torch.set_num_threads(1)
import diffusers_dq
from diffusers import PixArtTransformer2DModel
from tiny_models import MODELS
model = PixArtTransformer2DModel.from_pretrained({str(tmp_path / "model")!r})
expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
assert torch.equal(MODELS["PixArtTransformer2DModel"].run(model), expected)
"""
    subprocess.run([sys.executable, "-c", again], check=True)


def test_a_copy_and_a_dequantized_model(statistics):
    pipe = tiny_pixart_pipeline()
    dq.quantize(pipe, dq.DQConfig(**STATIC), statistics=statistics, progress=False)
    expected = PIXART.run(pipe.transformer)
    twin = copy.deepcopy(pipe.transformer)
    assert torch.equal(PIXART.run(twin), expected)
    modulations(twin)[0].offset += 1
    assert torch.equal(PIXART.run(pipe.transformer), expected) and not torch.equal(PIXART.run(twin), expected)


@pytest.mark.parametrize("name", ["PixArt", "Wan", "Flux2", "Chroma", "LTX2Video", "STDiT3", "SkyReelsV2", "Latte"])
def test_blocks_compile_to_one_graph_for_all_steps(name):
    tiny = next(tiny for tiny in MODELS.values() if tiny.cls.startswith(f"{name}Transformer") and not tiny.variant)
    full = tiny.build()
    low, high = sorted(tiny.timesteps[1:])
    chains = {}
    for group in spec_of(full).groups:
        if isinstance(group.producer, ModulatedNorm):
            channels = full.get_submodule(group.name).in_features
            shift = torch.randn(2, channels, generator=torch.Generator().manual_seed(0))
            chains[group.name] = Chain((Shift(shift), Scale(torch.full((channels,), 2.0))), ((low + high) / 2,))
    model = rebuilt_with_chains(full, chains)
    assert modulations(model)
    expected = [tiny.run(model, t) for t in tiny.timesteps]
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    tiny.run(model, tiny.timesteps[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for timestep, output in zip(tiny.timesteps, expected, strict=True):
            assert torch.equal(tiny.run(model, timestep), output)


def predictions(model: torch.nn.Module, statistics: dq.Statistics) -> torch.Tensor:
    """Of the inputs that calibration kept."""
    return torch.stack([y for _, y in Replay(model, statistics, TimestepGroups(), [()]).outputs({})])


@pytest.mark.parametrize("unit", ["block", "layer"])
def test_rounding_is_learned_behind_them(statistics, unit):
    settings = dict(weight_bits=4, rounding="adaround", reconstruction=dict(unit=unit, iterations=150))
    errors = {}
    exact = predictions(tiny_pixart_pipeline().transformer, statistics)
    for rounding in ("nearest", "adaround"):
        pipe = tiny_pixart_pipeline()
        config = dq.DQConfig(
            **STATIC, **({**settings, "rounding": rounding} if rounding == "adaround" else dict(weight_bits=4))
        )
        dq.quantize(pipe, config, statistics=statistics, progress=False)
        errors[rounding] = float((predictions(pipe.transformer, statistics) - exact).norm())
    assert errors["adaround"] < errors["nearest"]


@pytest.mark.parametrize("method", ["htg", "ptq4dit"])
def test_gptq_behind_quantized_blocks_sees_inputs_before_the_change(statistics, method):
    exact = PIXART.run(tiny_pixart_pipeline().transformer)
    errors = {}
    for rounding in ("nearest", "gptq"):
        pipe = tiny_pixart_pipeline()
        config = dq.DQConfig(method, weight_bits=4, rounding=rounding)
        dq.quantize(pipe, config, statistics=statistics, progress=False)
        errors[rounding] = float((PIXART.run(pipe.transformer) - exact).norm())
    # GPTQ minimises the error on the calibrated inputs; wrong ones would make it several times larger
    assert errors["gptq"] < 1.5 * errors["nearest"]


def test_a_file_without_its_modulation_is_refused(statistics, tmp_path):
    from safetensors.torch import load_file, save_file

    pipe = tiny_pixart_pipeline()
    dq.quantize(pipe, dq.DQConfig(**STATIC), statistics=statistics, progress=False)
    pipe.transformer.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["transformer_blocks.1.timestep_modulation.offset"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing .*timestep_modulation.offset"):
        PixArtTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (dict(axis=-1), "axis must be -2 or 1"),
        (dict(argument="foo"), "is of the argument foo, so it is called foo_modulation"),
    ],
    ids=str,
)
def test_a_config_that_nobody_wrote_is_refused(statistics, tmp_path, edit, message):
    pipe = tiny_pixart_pipeline()
    dq.quantize(pipe, dq.DQConfig(**STATIC), statistics=statistics, progress=False)
    result = pipe.transformer.hf_quantizer.quantization_config.result
    result["modulations"]["transformer_blocks.0.timestep_modulation"] |= edit
    with pytest.raises(ValueError, match=message):
        Description.from_dict(result)
