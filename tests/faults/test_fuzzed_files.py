# SPDX-License-Identifier: Apache-2.0
"""Files changed at random: they load to what they held, or are refused with a message; memory is limited meanwhile.

How many: fuzzing.py. A checksum notices every change, so files are drawn with theirs, and without any, as who means
harm would make them.
"""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from fuzzing import LINEAR, REFUSALS, changed, changes, damaged, fuzzed, joined, refused, spare_memory, split
from hypothesis import given
from hypothesis import strategies as st

import diffusers_dq as dq
from diffusers_dq.files import SEAL, read_tensors, sealed, write_tensors
from diffusers_dq.layout import LinearLayout
from diffusers_dq.linear import QuantizedLinear

SPARE = 1 << 30  # bytes that loading a file of some 400 kB may map


# A saved model: the quantization_config in config.json


@pytest.fixture(scope="module", params=["htg", "qdit", "smoothquant"])
def saved(request, dit_folder, dit_statistics, tmp_path_factory):
    """(folder, config.json, tensors of the loaded model by name). The config holds no checksum: changes must be found
    without it."""
    options = {
        "htg": dict(method="htg", weight_bits=4, guard_steps=(1, 1), noise_correction=True),
        "qdit": dict(method="qdit", weight_bits=4, quantize_attention=True),
        "smoothquant": dict(method="smoothquant", weight_bits=6, low_rank=2, online=True),
    }[request.param]
    pipe = DiTPipeline.from_pretrained(dit_folder)
    dq.quantize(pipe, dq.DQConfig(**options), statistics=dit_statistics, progress=False)
    folder = tmp_path_factory.mktemp(request.param)
    pipe.transformer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["result"][SEAL]
    return folder, config, dict(pipe.transformer.state_dict())


def load(folder):
    return DiTTransformer2DModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def folder_with(tmp_path_factory):
    """A function: a folder with this config.json and these weights."""
    folder = tmp_path_factory.mktemp("fuzzed")

    def write(config, weights):
        if isinstance(weights, bytes):
            (folder / "diffusion_pytorch_model.safetensors").write_bytes(weights)
        else:
            shutil.copyfile(weights, folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return folder

    return write


def weights_of(folder):
    return Path(folder) / "diffusion_pytorch_model.safetensors"


def layouts(model):
    return {name: module.layout for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@fuzzed(0.4 / 3)
@given(data=st.data())
def test_a_changed_config_is_refused_or_changes_no_more_than_it_says(saved, folder_with, run_dit, data):
    folder, config, tensors = saved
    edits = data.draw(changes(config["quantization_config"]))
    fuzz = {**config, "quantization_config": changed(config["quantization_config"], edits)}
    if not isinstance(fuzz["quantization_config"], dict) or not fuzz["quantization_config"].get("quant_method"):
        return  # diffusers takes it for no model of ours
    target = folder_with(fuzz, weights_of(folder))
    try:
        with spare_memory(SPARE):
            model = load(target)
    except REFUSALS as error:
        refused(error)
        return
    result = fuzz["quantization_config"]["result"]
    if result.get("tied") == config["quantization_config"]["result"]["tied"]:
        assert_same(model.state_dict(), tensors)
    for name, layout in layouts(model).items():
        assert layout == LinearLayout(**result["linears"][name]), "a layer is as its file says"
    try:
        run_dit(model, (500,))
    except REFUSALS as error:
        refused(error)


def assert_same(loaded, tensors):
    assert loaded.keys() == tensors.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize(
    "change",
    [
        lambda result: result.update(partitions=[10**9, 10**9]),
        lambda result: result.update(partitions=[10**12, 0]),
        lambda result: result.update(partitions=[1, 10**12]),
        lambda result: result.update(partitions=[1, -1]),
        lambda result: result.update(noise_correction=[10**12, 4]),
        lambda result: result.update(noise_correction=[10**9, 10**9]),
        lambda result: result.update(attention=[""]),
        lambda result: result.update(tied={"transformer_blocks.0": ""}),
        lambda result: result.update(tied={"transformer_blocks.0.ff": "transformer_blocks.0"}),
        lambda result: result.update(tied={"transformer_blocks.1": "transformer_blocks.0"}),
        lambda result: result.update(tied={"transformer_blocks.1": "transformer_blocks.1"}),
        lambda result: result.update(tied={"a": "b", "b": "c"}),
        lambda result: result.update(attention=["transformer_blocks.0.ff"]),
        lambda result: result["linears"][LINEAR].update(bias_groups=10**12),
        lambda result: result["linears"][LINEAR].update(shift_groups=10**12),
        lambda result: result["linears"][LINEAR].update(low_rank=10**12),
        lambda result: result["linears"][LINEAR].update(group_size=10**12),
        lambda result: result["linears"][LINEAR].update(rotation_order=2**40),
        lambda result: result["linears"][LINEAR].update(partition=10**12),
        lambda result: result["step_bits"].update(bits=[10**12, None, 16]),
        lambda result: result["step_bits"].update(boundaries=list(range(10**5))),
    ],
)
def test_what_no_file_says_is_refused_before_memory_is_asked_for(saved, folder_with, change):
    folder, config, _ = saved
    config = json.loads(json.dumps(config))
    if "step_bits" in change.__code__.co_consts and not config["quantization_config"]["result"]["step_bits"]:
        pytest.skip("of the model with guard steps")
    change(config["quantization_config"]["result"])
    target = folder_with(config, weights_of(folder))
    with spare_memory(1 << 26), pytest.raises(ValueError, match="quantization_config|damaged|shape"):
        load(target)


# A saved model: the file of weights


@fuzzed(0.3 / 3)
@given(data=st.data())
def test_a_damaged_file_of_weights_is_refused_without_a_checksum_but_for_its_values(saved, folder_with, data):
    """Of what is not its header nobody knows what it was: a flipped byte of a tensor is another tensor."""
    folder, config, tensors = saved
    content = weights_of(folder).read_bytes()
    fuzz = data.draw(damaged(content))
    target = folder_with(config, fuzz)
    try:
        with spare_memory(SPARE):
            loaded = load(target).state_dict()
    except REFUSALS as error:
        refused(error)
        return
    assert {name: (t.dtype, t.shape) for name, t in loaded.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }
    if split(fuzz)[1] == split(content)[1] and split(fuzz)[0] == split(content)[0]:
        assert_same(loaded, tensors)


@fuzzed(0.1 / 3)
@given(data=st.data())
def test_with_its_checksum_a_file_of_weights_loads_to_what_was_saved_or_not_at_all(saved, folder_with, data):
    folder, config, tensors = saved
    config = json.loads(json.dumps(config))
    of_file = DiTTransformer2DModel.from_pretrained(folder).hf_quantizer
    stored, _ = of_file.get_state_dict_and_metadata(tensors, safe_serialization=True)
    config["quantization_config"]["result"] = sealed(config["quantization_config"]["result"], stored)
    target = folder_with(config, data.draw(damaged(weights_of(folder).read_bytes())))
    try:
        with spare_memory(SPARE):
            loaded = load(target).state_dict()
    except REFUSALS as error:
        refused(error)
        return
    assert_same(loaded, tensors)


# Statistics


def facts(statistics):
    """All that a statistics file says, in JSON and tensors."""
    tensors = {f"{name}/{key}": t for name, site in statistics.sites.items() for key, t in site.tensors().items()}
    tensors |= {"timesteps": statistics.timesteps, "fingerprint": statistics.fingerprint}
    return {name: list(site.linears) for name, site in statistics.sites.items()}, dict(statistics.about), tensors


@fuzzed(0.1)
@given(data=st.data())
def test_damaged_statistics_are_refused_by_their_checksum(dit_statistics, dit_statistics_path, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged-statistics"
    path.write_bytes(data.draw(damaged(Path(dit_statistics_path).read_bytes())))
    try:
        with spare_memory(SPARE):
            loaded = dq.Statistics.load(path)
    except REFUSALS as error:
        refused(error)
        return
    ours = split(path.read_bytes())[0].get("__metadata__", {}).get("diffusers_dq", "")
    if re.match("[0-9a-f]{8} ", ours):
        for ours, theirs in zip(facts(loaded), facts(dit_statistics), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(
                torch.equal(ours[key], theirs[key]) if torch.is_tensor(ours[key]) else ours[key] == theirs[key]
                for key in ours
            )


@fuzzed(0.1)
@given(data=st.data())
def test_statistics_with_a_changed_header_and_no_checksum_quantize_or_are_refused(
    dit_folder, dit_statistics_path, tmp_path_factory, data
):
    header, tensors = split(Path(dit_statistics_path).read_bytes())
    ours = json.loads(header["__metadata__"]["diffusers_dq"].partition(" ")[2])
    ours = changed(ours, data.draw(changes(ours)))
    header["__metadata__"] = {"diffusers_dq": json.dumps(ours)}
    if data.draw(st.booleans()):
        header = changed(header, data.draw(changes({key: header[key] for key in header if key != "__metadata__"})))
    path = tmp_path_factory.getbasetemp() / "changed-statistics"
    path.write_bytes(joined(header, tensors))
    model = DiTTransformer2DModel.from_pretrained(dit_folder, subfolder="transformer")
    before = dict(model.state_dict())
    try:
        with spare_memory(SPARE):
            statistics = dq.Statistics.load(path)
            dq.quantize(model, dq.DQConfig("htg"), statistics=statistics, progress=False)
    except REFUSALS as error:
        refused(error)
        assert_same(model.state_dict(), before)
        return
    assert all(torch.isfinite(tensor.float()).all() for tensor in model.state_dict().values())


def test_a_deeply_nested_header_is_refused(dit_statistics_path, tmp_path):
    header, tensors = split(Path(dit_statistics_path).read_bytes())
    for nested in ("[" * 10**5 + "]" * 10**5, '{"list":' * 10**5 + "1" + "}" * 10**5, "1" * 10**5):
        header["__metadata__"] = {"diffusers_dq": nested}
        (tmp_path / "s").write_bytes(joined(header, tensors))
        with pytest.raises(ValueError, match="damaged or cut short"):
            dq.Statistics.load(tmp_path / "s")


def test_a_config_json_cut_short_is_refused(saved, folder_with):
    folder, config, _ = saved
    text = json.dumps(config)
    for end in range(0, len(text) - 1, len(text) // 20):
        with pytest.raises(REFUSALS):
            load(folder_with(text[:end], weights_of(folder)))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({f"{LINEAR}7/integers": torch.zeros(1)}),
        lambda tensors: tensors.pop(f"{LINEAR}/scale"),
        lambda tensors: tensors.pop(f"{LINEAR}/input_scale"),
        lambda tensors: tensors.update({f"{LINEAR}/integers": tensors[f"{LINEAR}/integers"][1:]}),
        lambda tensors: tensors.update({f"{LINEAR}/integers": tensors[f"{LINEAR}/integers"].float()}),
        lambda tensors: tensors.update({f"{LINEAR}/scale": tensors[f"{LINEAR}/scale"].repeat(2)}),
        lambda tensors: tensors.update({f"{LINEAR}/scale": tensors[f"{LINEAR}/scale"] * torch.nan}),
        lambda tensors: tensors.update({"": torch.zeros(1)}),
    ],
)
def test_a_checkpoint_of_rounding_that_does_not_fit_leaves_the_model_as_it_was(
    dit_folder, dit_statistics, tmp_path, change
):
    config = dq.DQConfig("ptq4dit", weight_bits=4, rounding="adaround", reconstruction={"iterations": 1})
    model = DiTTransformer2DModel.from_pretrained(dit_folder, subfolder="transformer")
    before = copy.deepcopy(dict(model.state_dict()))
    path = tmp_path / "c"
    dq.quantize(copy.deepcopy(model), config, statistics=dit_statistics, progress=False, checkpoint=path)
    header, tensors = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors, header)
    with pytest.raises(ValueError, match="is damaged: what it holds of"):
        dq.quantize(model, config, statistics=dit_statistics, progress=False, checkpoint=path)
    assert_same(dict(model.state_dict()), before)
