# SPDX-License-Identifier: Apache-2.0
"""What is in a folder after models were saved to it; kills are in tests/faults."""

import gc
import json
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from support import tiny_pipeline

import diffusers_dq as dq


@pytest.fixture
def pipe():
    pipe = tiny_pipeline()
    dq.quantize(pipe, dq.DQConfig("rtn", weight_bits=4), progress=False)
    return pipe


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_shards_of_an_earlier_save_go_and_other_files_stay(pipe, tmp_path):
    model = pipe.transformer
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").write_text("another variant")
    kept = {"README.md", "config.json", "diffusion_pytorch_model.fp16.safetensors"}
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = names_in(tmp_path) - kept
    assert "diffusion_pytorch_model.safetensors.index.json" in shards and len(shards) > 3
    model.save_pretrained(tmp_path)
    assert names_in(tmp_path) == kept | {"diffusion_pytorch_model.safetensors"}
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert names_in(tmp_path) == kept | shards
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_variant_has_shards_and_an_index_of_its_own(pipe, tmp_path):
    pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer.save_pretrained(tmp_path, variant="w4", max_shard_size="60KB")
    assert "diffusion_pytorch_model.safetensors.index.w4.json" in names_in(tmp_path)
    pipe.transformer.save_pretrained(tmp_path, variant="w4")
    assert names_in(tmp_path) == {
        "config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.w4.safetensors"
    }  # fmt: skip


def test_options_of_a_pipelines_save_reach_the_transformer(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "new" / "p", max_shard_size="60KB")
    index = tmp_path / "new" / "p" / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 2
    loaded = DiTPipeline.from_pretrained(tmp_path / "new" / "p").transformer.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in pipe.transformer.state_dict().items())


def test_another_process_than_the_main_one_writes_nothing(pipe, tmp_path):
    pipe.transformer.save_pretrained(tmp_path / "a", is_main_process=False)
    pipe.transformer.save_pretrained(tmp_path / "a", False)
    assert names_in(tmp_path) == set()


def test_several_processes_may_save_one_model(pipe, tmp_path):
    """Threads stand for ranks that are not told which of them is the main one."""
    for i in range(5):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda folder: pipe.transformer.save_pretrained(folder), [tmp_path / str(i)] * 4))
        assert names_in(tmp_path / str(i)) == {"config.json", "diffusion_pytorch_model.safetensors"}
    DiTTransformer2DModel.from_pretrained(tmp_path / "4")


@pytest.mark.parametrize("name", [".", "..", "sub/..", "link", ""])
def test_the_folder_may_be_named_in_any_way(pipe, tmp_path, monkeypatch, name):
    here = tmp_path / "outer" / "here"
    (here / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (here / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(here)
    pipe.transformer.save_pretrained(name or here / "new")
    place = {".": here, "..": here.parent, "sub/..": here, "link": tmp_path / "elsewhere", "": here / "new"}[name]
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= names_in(place)
    assert names_in(place) <= {"config.json", "diffusion_pytorch_model.safetensors", "here", "sub", "link", "new"}
    assert Path.cwd() == here and (here / "sub").is_dir() and (here / "link").is_symlink()


def test_a_folder_that_is_there_keeps_its_mode(pipe, tmp_path):
    (tmp_path / "private").mkdir(mode=0o700)
    pipe.transformer.save_pretrained(tmp_path / "private")
    pipe.transformer.save_pretrained(tmp_path / "new")
    os.umask(umask := os.umask(0))
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "new" / "config.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_file_in_the_place_of_the_folder_stays(pipe, tmp_path):
    (tmp_path / "f").write_text("mine")
    with pytest.raises(OSError, match="f"):
        pipe.transformer.save_pretrained(tmp_path / "f")
    assert (tmp_path / "f").read_text() == "mine" and names_in(tmp_path) == {"f"}


def test_what_cannot_be_pushed_is_saved_all_the_same(pipe, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def asked(repo_id, **settings):
        raise Asked(repo_id)

    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", asked)
    for given, name in ((dict(), "dit-w4"), (dict(repo_id="me/dit"), "me/dit")):
        with pytest.raises(Asked, match=f"^{name}$"):
            pipe.transformer.save_pretrained(tmp_path / "dit-w4", push_to_hub=True, **given)
    assert names_in(tmp_path / "dit-w4") == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_model_that_nothing_else_holds_can_be_saved_and_moved(pipe, tmp_path):
    """As in from_pretrained(...).to("cuda")."""
    model = pipe.transformer
    model.save_pretrained(tmp_path)
    moved = DiTTransformer2DModel.from_pretrained(tmp_path).to("cpu")
    assert all(torch.equal(moved.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    DiTTransformer2DModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").exists()
    freed = weakref.ref(moved)
    gc.disable()
    try:
        del moved
        assert freed() is None, "and not longer than others do"
    finally:
        gc.enable()
