# SPDX-License-Identifier: Apache-2.0
"""Published Open-Sora checkpoints, in their own layout, as our models.

The shapes of the tensors say what the model is; what they cannot say (heads, scales of positions) comes from
config.json or from the caller.
"""

import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusers_dq.opensora.stdit import STDiTTransformer3DModel
from diffusers_dq.opensora.stdit3 import STDiT3Transformer3DModel

OpenSoraModel = STDiTTransformer3DModel | STDiT3Transformer3DModel

_PICKLES = {".pth", ".pt", ".bin", ".ckpt"}
_HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]
_RECOMPUTED = re.compile(r"pos_embed")  # pos_embed, pos_embed_temporal, pos_embed.inv_freq

_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "fps_embedder.mlp.0": "adaln_single.emb.fps_embedder.linear_1",
    "fps_embedder.mlp.2": "adaln_single.emb.fps_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "y_embedder": "caption_projection",  # its y_embedding
    "final_layer.linear": "proj_out",
    "final_layer": "",  # its scale_shift_table
}
_STACKS = {
    "blocks": "transformer_blocks",
    "spatial_blocks": "transformer_blocks",
    "temporal_blocks": "temporal_transformer_blocks",
}
_INSIDE = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "attn.q_norm": ("attn1.norm_q",),
    "attn.k_norm": ("attn1.norm_k",),
    "attn_temp.qkv": ("attn_temporal.to_q", "attn_temporal.to_k", "attn_temporal.to_v"),
    "attn_temp.proj": ("attn_temporal.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "": ("",),  # its scale_shift_table
}
_BLOCK = re.compile(r"(blocks|spatial_blocks|temporal_blocks)\.(\d+)\.(?:(.+)\.)?([^.]+)$")


def load_open_sora(
    source: str | os.PathLike[str],
    *,
    filename: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> OpenSoraModel:
    """STDiT (Open-Sora 1.0) or STDiT3 (Open-Sora 1.2), whichever the tensors are, in eval mode on the CPU.

    source: a .pth (unpickled with weights_only=True, so that no code in it runs) or .safetensors file, a folder with
    config.json and model.safetensors, or the files that model.safetensors.index.json names, or one .safetensors file
    of another name; or the name of a repository on the Hub, which is downloaded.
    filename: of a repository that is not such a folder: "OpenSora-v1-HQ-16x512x512.pth" of "hpcai-tech/Open-Sora".
    config: what the tensors do not say, and else has the default of the model's class: for STDiT
    `num_attention_heads`, `space_scale` (0.5 for 256 pixels), `time_scale` (2/3 for 64 frames), `sample_size`.

    Raises ValueError for tensors that are missing, not known, there twice or of a wrong shape, with their names, for a
    file that is damaged, a pickle that holds more than tensors, a folder of which it is not clear what the model is,
    and for variants of STDiT3 that are computed otherwise.
    """
    file = _locate(source, filename, revision)
    described = _published_config(file / "config.json") if file.is_dir() else {}
    return from_original(_read(file), dtype=dtype, **{**described, **config})


def from_original(
    tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32, **config: Any
) -> OpenSoraModel:
    """The model of a state dict in the published layout: flat, or nested under "ema" or "state_dict".

    config and errors as in `load_open_sora`. The tensors of the dict are copied only where their dtype changes or
    where a fused projection is split.
    """
    tensors = _flat(tensors)
    converted: dict[str, Tensor] = {}
    unknown, again = [], []
    for name, tensor in tensors.items():
        if _RECOMPUTED.match(name):
            continue
        if name == "rope.freqs":
            _check_rotation(tensor)
            continue
        names = _converted_names(name)
        again += [f"{name} ({new})" for new in names if new in converted]
        if len(names) > 1:
            parts = (part.to(dtype).clone() for part in tensor.chunk(len(names)))
            converted |= dict(zip(names, parts, strict=False))  # too few rows for all: some will be missing
        elif names:
            converted[names[0]] = tensor.to(dtype)
        else:
            unknown.append(name)

    if again:
        raise ValueError(f"these tensors are in the state dict under another name too: {', '.join(again)}")
    third = any(name.startswith("spatial_blocks.") for name in tensors)
    kind = STDiT3Transformer3DModel if third else STDiTTransformer3DModel
    _check_present(tensors, kind)
    with torch.device("meta"):
        model = kind(**{**_inferred_config(converted, kind, config.get("num_attention_heads")), **config})
    _check_tensors(converted, unknown, model.state_dict())
    model.load_state_dict(converted, assign=True)
    return model.eval()


# Where the tensors are


def _locate(source: str | os.PathLike[str], filename: str | None, revision: str | None) -> Path:
    """A file, or a folder with config.json."""
    from huggingface_hub import hf_hub_download, snapshot_download

    path = Path(source)
    if not path.exists():
        repository = str(source)
        if repository.count("/") != 1 or repository.startswith((".", "/", "~")) or path.suffix in _PICKLES:
            raise ValueError(f"there is no file or folder {source}, and it is no name on the Hub, owner/name")
        if filename is not None:
            return Path(hf_hub_download(repository, filename, revision=revision))
        path = Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES))
    path = path / filename if filename is not None else path
    if not path.exists():
        raise ValueError(f"{path.parent} holds no {path.name}; expected the name of one of its files")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no config.json; name one of its files by filename=...")
    return path


def _read(path: Path) -> Mapping[str, Tensor]:
    """Of a file, or of the files of a folder that are the model. Raises ValueError where two hold the same tensor."""
    if not path.is_dir():
        return _read_file(path)
    tensors: dict[str, Tensor] = {}
    for file in _files_of(path):
        content = _read_file(file)
        twice = sorted(tensors.keys() & content.keys())
        if twice:
            raise ValueError(
                f"{file} holds tensors that another file of the index holds too ({', '.join(twice[:5])}), so one of"
                " them is not of this model; name the file to read by filename=..."
            )
        tensors |= content
    return tensors


def _files_of(folder: Path) -> list[Path]:
    """model.safetensors, the files that an index names, or the only file that there is."""
    found = sorted(folder.glob("*.safetensors"))
    if folder / "model.safetensors" in found:
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        absent = [name for name in names if folder / name not in found]
        if not names or absent:
            raise ValueError(f"{index} must name files of its folder as weight_map; absent: {', '.join(absent)}")
        return [folder / name for name in names]
    if not found:
        raise ValueError(f"{folder} holds no .safetensors file; name another of its files by filename=...")
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds {', '.join(file.name for file in found)}, and neither a model.safetensors nor"
            f" {index.name} says which of them are the model; name one by filename=..."
        )
    return found


def _read_file(file: Path) -> Mapping[str, Tensor]:
    if file.suffix != ".safetensors" and file.suffix not in _PICKLES:
        known = ", ".join(sorted({*_PICKLES, ".safetensors"}))
        raise ValueError(f"{file} is no checkpoint that can be read: expected one of {known}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        return content
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is damaged or pickles more than tensors, and code from a file is never run here. If you trust the"
            f" file, convert it to .safetensors elsewhere ({_first_line(error)})"
        ) from None
    except Exception as error:  # whatever the bytes of a damaged file make the readers stumble over
        raise ValueError(f"{file} is damaged, or cut short; download it again ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: expected a JSON object, found {type(content).__name__}")
    return content


def _published_config(file: Path) -> dict[str, Any]:
    """Of STDiT3's config.json, what its tensors do not say; keys that only training reads are passed over."""
    published = _read_json(file)
    if published.get("qk_norm_legacy"):
        raise ValueError(f"{file} sets qk_norm_legacy: rotary positions before the norm, which is not supported")
    names = {"num_heads": "num_attention_heads", "input_sq_size": "sample_size"}
    return {ours: published[theirs] for theirs, ours in names.items() if theirs in published}


def _flat(tensors: Any) -> dict[str, Tensor]:
    if not isinstance(tensors, Mapping):
        raise ValueError(f"expected a state dict of tensors by name, got {type(tensors).__name__}")
    for nest in ("ema", "state_dict"):
        if isinstance(tensors.get(nest), Mapping):
            tensors = tensors[nest]
    others = sorted(
        str(name) for name, value in tensors.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    )
    if others:
        raise ValueError(
            "expected a state dict of tensors, flat or under 'ema' or 'state_dict'; these are no tensors:"
            f" {', '.join(others)}"
        )
    return dict(tensors)


# What they are called


def _converted_names(name: str) -> list[str]:
    """Ours, several for a fused projection, which is cut along its rows; [] for a name that is not known."""
    owner, _, leaf = name.rpartition(".")
    block = _BLOCK.match(name)
    if block:
        stack, index, inside, leaf = block.groups()
        return [
            ".".join(part for part in (_STACKS[stack], index, new, leaf) if part)
            for new in _INSIDE.get(inside or "", ())
        ]
    return [f"{_OUTSIDE[owner]}.{leaf}".lstrip(".")] if owner in _OUTSIDE else []


def _check_rotation(frequencies: Tensor) -> None:
    """STDiT3 stores its rotary frequencies, which nothing trains: they are worked out anew, and must be the same."""
    count = len(frequencies)
    expected = 10000.0 ** -(torch.arange(count, dtype=torch.float64) / count)
    if frequencies.ndim != 1 or not torch.allclose(frequencies.double().cpu(), expected, rtol=2**-7, atol=0):
        raise ValueError(
            "rope.freqs are not 10000^(-2 i / head width), as in Open-Sora 1.2; other rotary positions are not"
            " supported"
        )


# What they say about the model


def _check_present(tensors: Iterable[str], kind: type) -> None:
    """Those that the shape of the model is read from."""
    stack = "spatial_blocks" if kind is STDiT3Transformer3DModel else "blocks"
    needed = (
        "x_embedder.proj.weight",
        "y_embedder.y_embedding",
        "final_layer.linear.weight",
        f"{stack}.0.mlp.fc1.weight",
    )
    missing = sorted(set(needed) - set(tensors))
    if missing:
        raise ValueError(f"no Open-Sora checkpoint: {len(missing)} tensors are missing ({', '.join(missing)})")


def _inferred_config(converted: Mapping[str, Tensor], kind: type, heads: int | None) -> dict[str, Any]:
    """Arguments of the model's class, as far as shapes tell them. heads: where they cannot, else 16."""
    channels, in_channels, *patch_size = converted["pos_embed.proj.weight"].shape
    length, caption_channels = converted["caption_projection.y_embedding"].shape
    hidden = len(converted["transformer_blocks.0.ff.net.0.proj.weight"])
    norm = converted.get("transformer_blocks.0.attn1.norm_q.weight")
    heads = heads or (16 if norm is None else channels // len(norm))
    if channels % heads:
        raise ValueError(f"num_attention_heads must divide the width, {channels}; got {heads}")
    layers = {int(name.split(".")[1]) for name in converted if name.startswith("transformer_blocks.")}
    config = dict(
        num_attention_heads=heads,
        attention_head_dim=channels // heads,
        in_channels=in_channels,
        out_channels=len(converted["proj_out.weight"]) // torch.Size(patch_size).numel(),
        num_layers=max(layers) + 1,
        patch_size=tuple(patch_size),
        mlp_ratio=hidden / channels,
        caption_channels=caption_channels,
        caption_length=length,
    )
    return config | ({"qk_norm": norm is not None} if kind is STDiT3Transformer3DModel else {})


def _check_tensors(converted: Mapping[str, Tensor], unknown: Iterable[str], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError that lists what is missing, not known (by its published name) or of another shape."""
    missing = sorted(expected.keys() - converted.keys())
    extra = sorted([*unknown, *(converted.keys() - expected.keys())])
    shapes = [
        f"{name} {list(converted[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in converted and converted[name].shape != tensor.shape
    ]
    kinds = {"missing": missing, "not known": extra, "of another shape": shapes}
    found = [f"{len(names)} {kind} ({', '.join(names)})" for kind, names in kinds.items() if names]
    if found:
        raise ValueError(f"these tensors are no STDiT or STDiT3 as published: {'; '.join(found)}")
