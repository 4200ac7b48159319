# SPDX-License-Identifier: Apache-2.0
"""Where the tensors are does not change what is computed: offloading hooks and device maps, bit by bit.

Without an accelerator the hooks are the same and move tensors from the CPU to the CPU, by way of the meta device where
they are sequential.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiTPipeline, DiTTransformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel
from diffusers.hooks import apply_group_offloading
from support import CALLS, PIXART_CALL, assert_close, tiny_pipeline, tiny_pixart_pipeline

import diffusers_dq as dq
from diffusers_dq.fusion import unfuse

CONFIGS = {
    "rtn": dict(method="rtn", weight_bits=4),
    "htg": dict(method="htg", groups=3, online=True),
    "svdquant": dict(method="svdquant", low_rank=4, weight_bits=4),
    "attention": dict(method="htg", groups=3, quantize_attention=True),
}
PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu:0")


def make(name: str, config: str) -> Any:
    """A quantized pipeline, calibrated where its method wants that."""
    pipe = tiny_pipeline() if name == "dit" else tiny_pixart_pipeline()
    calls = CALLS if name == "dit" else [PIXART_CALL]
    chosen = dq.DQConfig(**CONFIGS[config])
    if not chosen.needs_statistics and not chosen.quantize_attention:
        dq.quantize(pipe, chosen, progress=False)
    else:
        dq.quantize(pipe, chosen, calls=calls, num_inference_steps=4, progress=False)
    return pipe


def images(pipe: Any) -> torch.Tensor:
    call = CALLS[0] if isinstance(pipe, DiTPipeline) else PIXART_CALL
    seed = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(**call, num_inference_steps=4, generator=seed, output_type="np").images)


@pytest.fixture(scope="module")
def outputs() -> Callable[..., torch.Tensor]:
    """A function: the images of a model on `PLACE` as a whole.   fused: with DiT's fused block, which stands back
    where hooks are inside of it: the same function, its sums in another order."""
    known: dict[tuple[str, str, bool], torch.Tensor] = {}

    def get(name: str, config: str, fused: bool = True) -> torch.Tensor:
        key = name, config, fused
        if key not in known:
            pipe = make(name, config).to(PLACE)
            if not fused:
                unfuse(pipe.transformer)
            known[key] = images(pipe)
        return known[key]

    return get


@pytest.mark.parametrize("config", CONFIGS)
def test_the_fused_block_is_the_same_function(outputs, config):
    assert_close(outputs("dit", config), outputs("dit", config, fused=False))


MODELS = [("dit", config) for config in CONFIGS] + [("pixart", "rtn"), ("pixart", "htg")]


@pytest.mark.parametrize("name, config", MODELS)
def test_model_cpu_offload(outputs, name, config):
    pipe = make(name, config)
    pipe.enable_model_cpu_offload(device=PLACE)
    for _ in range(2):
        assert torch.equal(images(pipe), outputs(name, config))


@pytest.mark.parametrize("name, config", MODELS)
def test_sequential_cpu_offload(outputs, name, config):
    pipe = make(name, config)
    if PLACE.type == "cpu":  # what enable_sequential_cpu_offload does; it insists on cpu:0, which accelerate cannot
        for model in (pipe.transformer, pipe.vae):
            cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    else:
        pipe.enable_sequential_cpu_offload(device=PLACE)
    assert all(p.is_meta for p in pipe.transformer.transformer_blocks.parameters())
    for _ in range(2):
        assert torch.equal(images(pipe), outputs(name, config, fused=False))


@pytest.mark.parametrize(
    "kind", [dict(offload_type="leaf_level"), dict(offload_type="block_level", num_blocks_per_group=1)]
)
@pytest.mark.parametrize("name, config", MODELS)
def test_group_offload(outputs, name, config, kind):
    pipe = make(name, config)
    model = pipe.transformer
    if model._supports_group_offloading:
        model.enable_group_offload(PLACE, torch.device("cpu"), **kind)
    else:
        with pytest.raises(ValueError, match="does not support group offloading"):
            model.enable_group_offload(PLACE, torch.device("cpu"), **kind)
        apply_group_offloading(model, PLACE, torch.device("cpu"), **kind)
    pipe.vae.to(PLACE)
    for _ in range(2):
        assert torch.equal(images(pipe), outputs(name, config, fused=kind["offload_type"] == "block_level"))


def test_group_offload_to_disk(outputs, tmp_path):
    pipe = make("pixart", "rtn")
    settings = dict(offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    pipe.transformer.enable_group_offload(PLACE, torch.device("cpu"), **settings)
    assert list(tmp_path.iterdir())
    pipe.vae.to(PLACE)
    assert torch.equal(images(pipe), outputs("pixart", "rtn"))


# Device maps


@pytest.fixture(scope="module")
def folders(tiny_flux, tmp_path_factory) -> dict[str, tuple[type, str]]:
    """Class and folder of small transformers in full precision, by name."""
    made = {}
    for name, pipe in (("dit", tiny_pipeline()), ("pixart", tiny_pixart_pipeline()), ("flux", tiny_flux())):
        folder = str(tmp_path_factory.mktemp(name))
        pipe.transformer.save_pretrained(folder)
        made[name] = (type(pipe.transformer), folder)
    return made


@pytest.mark.parametrize("kind", [DiTTransformer2DModel, PixArtTransformer2DModel, FluxTransformer2DModel])
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto", "balanced", "sequential"])
def test_device_maps_while_quantizing_and_while_loading(folders, tmp_path, kind, device_map):
    folder = next(folder for made, folder in folders.values() if made is kind)
    config = dq.DQConfig("rtn", weight_bits=4)
    expected = kind.from_pretrained(folder, quantization_config=config).state_dict()
    placed = kind.from_pretrained(folder, quantization_config=config, device_map=device_map)
    placed.save_pretrained(tmp_path)
    for model in (placed, kind.from_pretrained(tmp_path, device_map=device_map)):
        assert set(model.hf_device_map.values()) <= {"cpu", torch.device("cpu"), 0}
        tensors = model.state_dict()
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name].cpu(), expected[name]) for name in expected)


def test_a_class_that_names_no_parts_to_keep_whole_is_told_its_blocks(folders):
    kind, folder = folders["dit"]
    assert kind._no_split_modules is None
    with pytest.raises(ValueError, match="_no_split_modules"):
        kind.from_pretrained(folder, device_map="auto")
    model = kind.from_pretrained(folder, device_map="auto", quantization_config=dq.DQConfig("rtn"))
    assert model._no_split_modules == ["BasicTransformerBlock"] and kind._no_split_modules is None


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_disk_is_refused_while_quantizing_and_while_loading(folders, tmp_path, name):
    kind, folder = folders[name]
    kind.from_pretrained(folder, quantization_config=dq.DQConfig("rtn")).save_pretrained(tmp_path / "quantized")
    places = {"": "cpu", "proj_out" if name == "flux" else "proj_out_2": "disk"}
    for path, config in ((folder, dq.DQConfig("rtn")), (tmp_path / "quantized", None)):
        with pytest.raises(ValueError, match="puts parts of the model on disk"):
            kind.from_pretrained(path, quantization_config=config, device_map=places, offload_folder=tmp_path / "off")
