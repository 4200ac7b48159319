# SPDX-License-Identifier: Apache-2.0
"""Files made by somebody who means harm: paths that lead elsewhere, pickles that run code."""

import ast
import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from safetensors import SafetensorError
from support import CALLS

import diffusers_dq as dq
from diffusers_dq.search.record import Record

PACKAGES = [Path(dq.__file__).parent, Path(dq.__file__).parent.parent / "kernels" / "diffusers_dq_kernels"]


@pytest.fixture(scope="module")
def sharded(dit_folder, tmp_path_factory):
    """A quantized transformer in shards, and its outputs' model."""
    model = DiTTransformer2DModel.from_pretrained(dit_folder, subfolder="transformer")
    dq.quantize(model, dq.DQConfig("rtn", weight_bits=4), progress=False)
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture
def index(sharded, tmp_path):
    """(folder, a function that lets the index name another file for the first shard)."""
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    path = folder / "diffusion_pytorch_model.safetensors.index.json"

    def point_to(name):
        content = json.loads(path.read_text())
        first = min(content["weight_map"].values())
        content["weight_map"] = {
            key: name if shard == first else shard for key, shard in content["weight_map"].items()
        }
        path.write_text(json.dumps(content))
        return first

    return folder, point_to


@pytest.mark.parametrize("where", ["../{}", "{parent}/{}", "sub/../../{}", "../../../../../../etc/passwd", "./{}"])
def test_a_shard_outside_of_the_folder_is_refused_even_where_it_is_the_right_one(index, where):
    folder, point_to = index
    first = point_to("")
    shutil.copyfile(folder / first, folder.parent / first)
    (folder / "sub").mkdir()
    name = where.format(first, parent=folder.parent)
    shard = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shard["weight_map"] = {key: value or name for key, value in shard["weight_map"].items()}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(shard))
    with pytest.raises(ValueError, match="path separator"):
        DiTTransformer2DModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="path separator|outside|plain"):
        dq.inspect(folder)


def test_statistics_that_config_json_names_are_neither_read_nor_downloaded(dit_folder, tmp_path, monkeypatch):
    """Of a model in full precision that somebody has published: they would be asked for at any place he likes."""
    asked = []
    monkeypatch.setattr(dq.Statistics, "load", lambda *arguments, **keywords: asked.append(arguments))
    model = DiTTransformer2DModel.from_pretrained(dit_folder, subfolder="transformer")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("attacker/repo", "/etc/passwd"):
        named = dq.DQConfig("htg", statistics=name)
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": named.to_dict()}))
        for arguments in ({}, {"quantization_config": dq.DQConfig("rtn")}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # diffusers' own: that of the two configs the file's is taken
                with pytest.raises(ValueError, match=f"names statistics, '{name}'.* pass quantization_config="):
                    DiTTransformer2DModel.from_pretrained(tmp_path, **arguments)
    assert asked == []


# Pickles


class Mischief:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def mischief(tmp_path):
    """(what makes the file when it is unpickled, the file)."""
    harm = tmp_path / "harm"
    pickle.loads(pickle.dumps(Mischief(harm))).close()
    assert harm.exists(), "it works"
    harm.unlink()
    return Mischief(harm), harm


def as_pickle(path, mischief):
    Path(path).write_bytes(pickle.dumps(mischief))


def as_torch(path, mischief):
    torch.save({"weight": mischief}, path)


@pytest.mark.parametrize("write", [as_pickle, as_torch])
def test_nothing_in_place_of_a_file_that_we_read_is_unpickled(dit_folder, dit_statistics, tmp_path, mischief, write):
    mischief, harm = mischief
    path = tmp_path / "file"
    write(path, mischief)
    pipe = DiTPipeline.from_pretrained(dit_folder)
    learned = dq.DQConfig("ptq4dit", rounding="adaround", reconstruction={"iterations": 1})
    for read in (
        lambda: dq.Statistics.load(path),
        lambda: dq.calibrate(pipe, CALLS, num_inference_steps=2, progress=False, checkpoint=path),
        lambda: dq.quantize(pipe, dq.DQConfig("htg", statistics=str(path)), progress=False),
        lambda: dq.quantize(pipe, learned, statistics=dit_statistics, progress=False, checkpoint=path),
        lambda: dq.quantize(pipe, str(path), progress=False),
        lambda: dq.DQConfig.from_json_file(path),
        lambda: Record(path, {}),
    ):
        with pytest.raises(ValueError, match="damaged|is not JSON|no checkpoint"):
            read()
    assert not harm.exists()


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
@pytest.mark.parametrize("write", [as_pickle, as_torch])
def test_a_model_folder_with_a_pickle_is_refused(sharded, tmp_path, mischief, write, name):
    """diffusers falls back to .bin, and reads it with weights_only=True."""
    mischief, harm = mischief
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(sharded / "config.json", folder / "config.json")
    write(folder / name, mischief)
    with pytest.raises((OSError, ValueError)):
        DiTTransformer2DModel.from_pretrained(folder)
    with pytest.raises((OSError, ValueError)):
        dq.inspect(folder)
    assert not harm.exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("write", [as_pickle, as_torch])
def test_an_open_sora_checkpoint_is_not_unpickled(tmp_path, mischief, write, suffix):
    from diffusers_dq.opensora import load_open_sora

    mischief, harm = mischief
    write(tmp_path / f"model{suffix}", mischief)
    with pytest.raises((ValueError, SafetensorError)):
        load_open_sora(tmp_path / f"model{suffix}")
    assert not harm.exists()


def dangerous(tree):
    """Line and name of what may run code from a file: loaders that unpickle, imports of relatives of pickle."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in ("torch.load", "torch.hub.load_state_dict_from_url") and keywords.get("weights_only") != "True":
                yield node.lineno, name
            if name.endswith(("np.load", "numpy.load")) and keywords.get("allow_pickle", "False") != "False":
                yield node.lineno, name
            if name.rpartition(".")[2] in ("Unpickler", "read_pickle", "add_safe_globals"):
                yield node.lineno, name
            if name in ("pickle.load", "pickle.loads", "eval", "exec", "yaml.load", "yaml.unsafe_load"):
                yield node.lineno, name
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if {"dill", "cloudpickle", "shelve", "joblib", "marshal"} & {*names, module}:
            yield node.lineno, f"import {names}"
        if module == "pickle" and {"load", "loads"} & set(names) or module == "torch" and "load" in names:
            yield node.lineno, f"from {module} import {names}"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_no_line_of_the_package_unpickles(package):
    found = [
        f"{path.name}:{line}: {name}"
        for path in sorted(package.rglob("*.py"))
        for line, name in dangerous(ast.parse(path.read_text()))
    ]
    assert len(list(package.rglob("*.py"))) > 10
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.loads(x)",
        "np.load(f, allow_pickle=True)",
        "eval(x)",
    ],
)
def test_the_search_for_such_lines_finds_them(line):
    assert list(dangerous(ast.parse(line)))
