# SPDX-License-Identifier: Apache-2.0
"""Published Open-Sora checkpoints, in their own layout, as our models.

The shapes of the tensors say what the model is; what they cannot say (heads, scales of positions) comes from
config.json or from the caller.
"""

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_dq.opensora.reading import first_line, locate, published_config, read
from diffusers_dq.opensora.stdit import STDiTTransformer3DModel
from diffusers_dq.opensora.stdit3 import STDiT3Transformer3DModel

OpenSoraModel = STDiTTransformer3DModel | STDiT3Transformer3DModel

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
_NAMED = 10  # at most, of what an error lists
_BLOCK = re.compile(r"(blocks|spatial_blocks|temporal_blocks)\.([0-9]{1,9})\.(?:(.+)\.)?([^.]+)$")


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
    file that is damaged, or holds fewer numbers than its tensors claim, a pickle that holds more than tensors, a
    folder of which it is not clear what the model is, and for variants of STDiT3 that are computed otherwise.
    """
    file = locate(source, filename, revision)
    described = published_config(file / "config.json") if file.is_dir() else {}
    return from_original(read(file), dtype=dtype, **{**described, **config})


def from_original(
    tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32, **config: Any
) -> OpenSoraModel:
    """The model of a state dict in the published layout: flat, or nested under "ema" or "state_dict".

    config and errors as in `load_open_sora`. The tensors of the dict are copied only where their dtype changes or
    where a fused projection is split; nothing is copied, and no more than one block laid out, before all is checked.
    """
    tensors = _flat(tensors)
    _check_sound(tensors)
    found: dict[str, Tensor] = {}
    split: set[str] = set()
    unknown, again = [], []
    for name, tensor in tensors.items():
        if _RECOMPUTED.match(name):
            continue
        if name == "rope.freqs":
            _check_rotation(tensor)
            continue
        names = _converted_names(name)
        again += [f"{name} ({new})" for new in names if new in found]
        found |= dict(zip(names, tensor.chunk(len(names)) if names else (), strict=False))  # too few: some are missing
        split.update(names if len(names) > 1 else ())
        unknown += [] if names else [name]

    if again:
        raise ValueError(f"these tensors are in the state dict under another name too: {', '.join(again)}")
    third = any(name.startswith("spatial_blocks.") for name in tensors)
    kind = STDiT3Transformer3DModel if third else STDiTTransformer3DModel
    _check_present(tensors, kind)
    config = {**_inferred_config(found, kind, config.get("num_attention_heads")), **config}
    _check_tensors(found, unknown, _expected(kind, config))
    _check_held(found.values())
    with torch.device("meta"):
        model = kind(**config)
    converted = {name: tensor.to(dtype, copy=name in split) for name, tensor in found.items()}
    model.load_state_dict(converted, assign=True)
    return model.eval()


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
    expected = 10000.0 ** -(torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies))
    if frequencies.ndim != 1 or not torch.allclose(frequencies.double().cpu(), expected, rtol=2**-7, atol=0):
        raise ValueError(
            "rope.freqs are not 10000^(-2 i / head width), as in Open-Sora 1.2; other rotary positions are not"
            " supported"
        )


# What they say about the model


def _check_held(tensors: Collection[Tensor]) -> None:
    """Raises ValueError where tensors are parts of each other: as a model's they would not be."""
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    claimed = sum(tensor.nbytes for tensor in tensors)
    if claimed > sum(held.values()):
        raise ValueError(f"the tensors share values: they claim {claimed} bytes, and there are {sum(held.values())}")


def _check_sound(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for what is no array of floating-point numbers that are all there.

    A pickle of a few bytes can hold a tensor of any size, all of its elements one number; copies of it would not be
    small.
    """
    for name, tensor in tensors.items():
        if _RECOMPUTED.match(name):
            continue
        if (
            tensor.layout != torch.strided
            or tensor.is_nested
            or tensor.device.type == "meta"
            or not tensor.is_floating_point()
        ):
            what = f"{tensor.dtype} on the {tensor.device.type} device, {tensor.layout}"
            raise ValueError(f"{name} is {what}; expected floating-point numbers, dense and with values")
        shape = list(tensor.shape)
        if not shape or not all(shape):
            raise ValueError(f"{name} has shape {shape}; expected at least one dimension, and none of size 0")
        if tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise ValueError(f"{name} claims shape {shape}, {tensor.nbytes} bytes, and the file holds fewer of it")


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


def _inferred_config(found: Mapping[str, Tensor], kind: type, heads: int | None) -> dict[str, Any]:
    """Arguments of the model's class, as far as shapes tell them. heads: where they cannot, else 16."""
    channels, in_channels, *patch_size = _shape(found, "pos_embed.proj.weight", 5)
    length, caption_channels = _shape(found, "caption_projection.y_embedding", 2)
    hidden, _ = _shape(found, "transformer_blocks.0.ff.net.0.proj.weight", 2)
    rows, _ = _shape(found, "proj_out.weight", 2)
    norm = "transformer_blocks.0.attn1.norm_q.weight"
    width = _shape(found, norm, 1)[0] if norm in found else None
    if heads is None:
        heads = 16 if width is None else max(1, channels // width)
    if type(heads) is not int or heads < 1 or channels % heads:
        raise ValueError(f"num_attention_heads must divide the width, {channels}; got {heads}")
    if rows % math.prod(patch_size):
        raise ValueError(f"proj_out has {rows} rows, which are no multiple of a patch of {patch_size}")
    config = dict(
        num_attention_heads=heads,
        attention_head_dim=channels // heads,
        in_channels=in_channels,
        out_channels=rows // math.prod(patch_size),
        num_layers=_layers(found),
        patch_size=tuple(patch_size),
        mlp_ratio=hidden / channels,
        caption_channels=caption_channels,
        caption_length=length,
    )
    return config | ({"qk_norm": width is not None} if kind is STDiT3Transformer3DModel else {})


def _shape(found: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(found[name].shape)
    if len(shape) != dimensions:
        raise ValueError(f"{name} has shape {list(shape)}; expected {dimensions} dimensions")
    return shape


def _layers(found: Iterable[str]) -> int:
    """Raises ValueError where a block is left out: a single name could ask for any number of them."""
    numbers = {int(name.split(".")[1]) for name in found if name.startswith("transformer_blocks.")}
    absent = next(i for i in range(len(numbers) + 1) if i not in numbers)
    if absent != len(numbers):
        raise ValueError(f"there is a block {max(numbers)} and no block {absent}: one is missing, or one misnamed")
    return len(numbers)


def _expected(kind: type, config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Shapes of the model's tensors by name, from one block of each stack."""
    try:
        with torch.device("meta"):
            one = kind(**{**config, "num_layers": 1}).state_dict()
    except RuntimeError as error:  # no tensor has so many bytes
        raise ValueError(f"the tensors' shapes make no model of {kind.__name__} ({first_line(error)})") from None
    shapes: dict[str, torch.Size] = {}
    for name, tensor in one.items():
        stack, first, rest = name.partition("transformer_blocks.0.")
        numbered = [f"{stack}transformer_blocks.{i}.{rest}" for i in range(config["num_layers"])] if first else [name]
        shapes |= dict.fromkeys(numbered, tensor.shape)
    return shapes


def _check_tensors(found: Mapping[str, Tensor], unknown: Iterable[str], expected: Mapping[str, torch.Size]) -> None:
    """Raises ValueError that lists what is missing, not known (by its published name) or of another shape."""
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "not known": sorted([*unknown, *(found.keys() - expected.keys())]),
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ],
    }
    wrong = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
    if wrong:
        raise ValueError(f"these tensors are no STDiT or STDiT3 as published: {'; '.join(wrong)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
