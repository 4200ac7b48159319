# SPDX-License-Identifier: Apache-2.0
"""Published files, in each of their forms; and files that are none."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusers_dq.opensora import (
    STDiT3Transformer3DModel,
    STDiTTransformer3DModel,
    from_original,
    load_open_sora,
)

HEADS = {"num_attention_heads": 2}


def same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def save_shards(tensors, folder, first=slice(20), second=slice(20, None)):
    """Two files in the layout of the Hub, and the index that names them."""
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    names, files = sorted(tensors), {}
    for file, part in zip(shards, (first, second), strict=True):
        save_file({name: tensors[name].float() for name in names[part]}, folder / file)
        files |= dict.fromkeys(names[part], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("nest", [None, "ema", "state_dict"], ids=str)
def test_a_pth_file_is_read_flat_or_nested(published_v1, nest, tmp_path):
    positions = {"pos_embed": torch.zeros(1, 4, 32), "pos_embed_temporal": torch.zeros(1, 2, 32)}
    tensors = {**published_v1, **positions}
    torch.save(tensors if nest is None else {nest: tensors, "step": 7}, tmp_path / "stdit.pth")
    model = load_open_sora(tmp_path / "stdit.pth", space_scale=0.5, **HEADS)
    assert isinstance(model, STDiTTransformer3DModel) and not model.training
    assert same(model, from_original(published_v1, space_scale=0.5, **HEADS))
    assert model.dtype == torch.float32 and model.config.space_scale == 0.5
    assert (model.config.num_layers, model.config.caption_length, model.config.out_channels) == (2, 6, 8)


def test_a_folder_in_the_layout_of_the_hub_is_read(published_v3, tmp_path):
    """Also sharded; heads and the size of positions are in config.json."""
    config = {"num_heads": 2, "input_sq_size": 256, "model_type": "STDiT3", "enable_flash_attn": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_shards(published_v3, tmp_path)
    save_file({"blocks.0.mlp.fc1.bias": torch.zeros(3)}, tmp_path / "ema.safetensors")  # which the index does not name
    model = load_open_sora(tmp_path, dtype=torch.bfloat16)
    assert isinstance(model, STDiT3Transformer3DModel)
    assert same(model, from_original(published_v3, dtype=torch.bfloat16, sample_size=256))
    assert model.config.sample_size == 256 and model.config.attention_head_dim == 16 and model.config.qk_norm


@pytest.mark.parametrize("filename", [None, "OpenSora.pth"])
def test_a_repository_is_downloaded(published_v1, published_v3, filename, tmp_path, monkeypatch):
    """Only what is needed; here the Hub is a folder."""
    import huggingface_hub

    asked = []
    torch.save(published_v1, tmp_path / "OpenSora.pth")
    (tmp_path / "config.json").write_text("{}")
    save_file(published_v3, tmp_path / "model.safetensors")

    def one(repository, name, revision=None):
        asked.append((repository, name, revision))
        return str(tmp_path / name)

    def whole(repository, revision=None, allow_patterns=None):
        asked.append((repository, tuple(allow_patterns), revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", whole)
    model = load_open_sora("someone/open-sora", filename=filename, revision="main", **HEADS)
    patterns = ("config.json", "*.safetensors", "*.safetensors.index.json")
    assert asked == [("someone/open-sora", filename or patterns, "main")]
    assert same(model, from_original(published_v3 if filename is None else published_v1, **HEADS))


def test_the_empty_caption_survives_saving(published_v1, tmp_path):
    model = from_original(published_v1, **HEADS)
    assert torch.equal(model.caption_projection.y_embedding, published_v1["y_embedder.y_embedding"].float())
    model.save_pretrained(tmp_path)
    again = STDiTTransformer3DModel.from_pretrained(tmp_path)
    assert same(again, model)
    assert list(again.config.patch_size) == [1, 2, 2] and again.config.caption_length == 6


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_pickle_is_not_run(published_v1, tmp_path):
    trace = tmp_path / "trace"
    torch.save({**published_v1, "extra": _Touch(trace)}, tmp_path / "stdit.pth")
    with pytest.raises(ValueError, match="code from a file is never run"):
        load_open_sora(tmp_path / "stdit.pth")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.attn.qkv.bias": None}, r"3 missing \(transformer_blocks.0.attn1.to_k.bias, .*to_v.bias\)"),
        ({"blocks.1.scale_shift_table": None}, r"1 missing \(transformer_blocks.1.scale_shift_table\)"),
        ({"blocks.0.lora.weight": torch.ones(2)}, r"1 not known \(blocks.0.lora.weight\)"),
        ({"decoder.weight": torch.ones(2)}, r"1 not known \(decoder.weight\)"),
        ({"fps_embedder.mlp.0.bias": torch.ones(32)}, r"1 not known \(adaln_single.emb.fps_embedder.linear_1.bias\)"),
        (
            {"blocks.1.mlp.fc2.bias": torch.ones(31)},
            r"1 of another shape \(.*ff.net.2.bias \[31\] instead of \[32\]\)",
        ),
        ({"y_embedder.y_embedding": None}, r"1 tensors are missing \(y_embedder.y_embedding\)"),
        ({"epoch": 3}, "no tensors: epoch"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(published_v1, change, message):
    tensors = {**published_v1, **change}
    with pytest.raises(ValueError, match=message):
        from_original({name: tensor for name, tensor in tensors.items() if tensor is not None}, **HEADS)


def test_variants_that_compute_otherwise_are_refused(published_v3, tmp_path):
    with pytest.raises(ValueError, match="other rotary positions"):
        from_original({**published_v3, "rope.freqs": published_v3["rope.freqs"] / 2})
    (tmp_path / "config.json").write_text('{"qk_norm_legacy": true}')
    with pytest.raises(ValueError, match="qk_norm_legacy"):
        load_open_sora(tmp_path)
    with pytest.raises(ValueError, match="must divide the width, 32; got 5"):
        from_original(published_v3, num_attention_heads=5)
    with pytest.raises(TypeError, match="speed"):
        from_original(published_v3, speed=2)


def test_places_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no file or folder"):
        load_open_sora(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"holds no absent\.pth"):
        load_open_sora(tmp_path, filename="absent.pth")
    with pytest.raises(ValueError, match="no config.json"):
        load_open_sora(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no .safetensors file"):
        load_open_sora(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        load_open_sora(tmp_path, filename="notes.txt")
    (tmp_path / "cut.pth").write_bytes(os.urandom(64))
    with pytest.raises(ValueError, match=r"cut\.pth is damaged"):
        load_open_sora(tmp_path / "cut.pth")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    return tmp_path


def test_of_several_files_the_model_is_read(published_v3, folder):
    """Averaged weights beside the model are no part of it, and a file of another name is one when it is alone."""
    averaged = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in published_v3.items()}
    averaged["rope.freqs"] = published_v3["rope.freqs"]
    save_file(averaged, folder / "ema.safetensors")
    assert same(load_open_sora(folder), from_original(averaged))
    save_file(published_v3, folder / "model.safetensors")
    assert same(load_open_sora(folder), from_original(published_v3))
    assert same(load_open_sora(folder, filename="ema.safetensors"), from_original(averaged))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds ema.safetensors, other.safetensors, and neither .* filename="):
        load_open_sora(folder)


def test_a_tensor_that_is_there_twice_is_refused(published_v1, published_v3, folder):
    save_shards(published_v3, folder, second=slice(19, None))
    with pytest.raises(ValueError, match=f"00002.safetensors holds tensors that another.*{sorted(published_v3)[19]}"):
        load_open_sora(folder)
    twin = {"spatial_blocks.0.mlp.fc1.bias": published_v1["blocks.0.mlp.fc1.bias"]}
    with pytest.raises(
        ValueError, match=r"under another name too: spatial_blocks.0.mlp.fc1.bias \(transformer_blocks"
    ):
        from_original({**published_v1, **twin}, **HEADS)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "model-00003-of-00003.safetensors"}}', "absent: model-00003-of-00003.safetensors"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "absent: ../secret.safetensors"),
        ('{"weight_map": {}}', "must name files"),
        ("[]", "expected a JSON object, found list"),
        ("{", "index.json is damaged"),
    ],
    ids=["absent", "elsewhere", "empty", "list", "cut"],
)
def test_an_index_that_names_no_files_is_refused(published_v3, folder, index, message):
    save_shards(published_v3, folder)
    save_file({"a": torch.ones(1)}, folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        load_open_sora(folder)


@pytest.mark.parametrize("name", ["stdit.pth", "old.pth", "stdit.safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 1000, 0.5, 0.99], ids=str)
def test_a_file_that_is_cut_short_is_refused(published_v1, name, kept, tmp_path):
    """kept: bytes, or a share of them. old.pth: as torch wrote files before 1.6, without a table of contents."""
    file = tmp_path / name
    if name == "stdit.safetensors":
        save_file(published_v1, file)
    else:
        torch.save(published_v1, file, _use_new_zipfile_serialization=name == "stdit.pth")
    assert load_open_sora(file, **HEADS)
    whole = file.read_bytes()
    file.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load_open_sora(file, **HEADS)


@pytest.mark.parametrize("content", [[1], torch.ones(2), {1: torch.ones(2)}], ids=["list", "tensor", "number"])
def test_a_file_of_something_else_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected a state dict of tensors"):
        load_open_sora(tmp_path / "other.pth")
