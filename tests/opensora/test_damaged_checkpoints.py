# SPDX-License-Identifier: Apache-2.0
"""Checkpoints made by somebody who means harm: refused with ValueError before memory or time is spent on them."""

import json
import math
import time
from typing import Any, NamedTuple

import pytest
import torch
from fuzzing import JSON, NUMBERS, fuzzed, spare_memory
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from diffusers_dq.opensora import from_original, load_open_sora

SPARE = 1 << 28  # bytes; a checkpoint here has 300 kB
HEADS = 2
SECONDS = 10  # far above what a refusal takes, far below what a large model does


def huge(*shape):
    """One number, as many times as it takes."""
    return torch.ones(()).expand(shape)


def refused(tensors, message, **config):
    start = time.monotonic()
    with spare_memory(SPARE), pytest.raises(ValueError, match=message):
        from_original(tensors, **config)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("number", [2, 1000, 10**9 - 1])
def test_a_name_does_not_ask_for_blocks(published_v1, number):
    """2 is the next one: then all else of it is missing."""
    message = r"missing \(transformer_blocks.2.attn1|there is a block \d+ and no block 2"
    refused({**published_v1, f"blocks.{number}.mlp.fc1.bias": torch.ones(3)}, message, num_attention_heads=HEADS)


@pytest.mark.parametrize("number", ["1" * 10, "9" * 5000, "\u0663", "-1", "1e9"], ids=["10", "5000", "ar", "-", "e"])
def test_a_number_of_a_block_that_is_none_is_not_known(published_v1, number):
    refused({**published_v1, f"blocks.{number}.mlp.fc1.bias": torch.ones(3)}, "1 not known", num_attention_heads=HEADS)


def test_a_block_that_is_left_out_is_named(published_v3):
    tensors = {name: tensor for name, tensor in published_v3.items() if not name.startswith("spatial_blocks.0.")}
    refused(tensors | {"spatial_blocks.0.mlp.fc1.weight": torch.ones(2, 2)}, "missing")
    others = {name.replace("_blocks.1.", "_blocks.7."): tensor for name, tensor in published_v3.items()}
    refused(others, "there is a block 7 and no block 1")


DAMAGE = {
    "no rows": (lambda x: x[:0], "has shape .* none of size 0"),
    "no columns": (lambda x: x[..., :0], "none of size 0"),
    "wide, without rows": (lambda x: torch.empty(10**9, 0), "none of size 0"),
    "a number": (lambda x: x.flatten()[0].clone(), "at least one dimension"),
    "one number often": (lambda x: huge(*x.shape), "claims shape .* and the file holds fewer"),
    "one number 10^12 times": (lambda x: huge(10**6, 10**6), "claims shape"),
    "one row 10^12 times": (lambda x: torch.ones(32).expand(10**12, 32), "claims shape"),
    "on no device": (lambda x: x.to("meta"), "meta device"),
    "sparse": (lambda x: x.to_sparse(), "torch.sparse_coo"),
    "integers": (lambda x: x.long(), "torch.int64 .*expected floating-point numbers"),
    "complex": (lambda x: x.to(torch.complex64), "torch.complex64"),
    "one dimension more": (lambda x: x[None], "expected . dimension|of another shape"),
    "one dimension": (lambda x: x.flatten(), "expected . dimension|of another shape"),
    "thrice": (lambda x: torch.cat([x, x, x], dim=-1), "of another shape|no multiple of a patch"),
}
SHAPING = [
    "x_embedder.proj.weight",
    "y_embedder.y_embedding",
    "final_layer.linear.weight",
    "blocks.0.mlp.fc1.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.1.attn.qkv.bias",
]


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", SHAPING)
def test_shapes_that_none_has_are_refused(published_v1, name, change, message):
    if published_v1[name].ndim == 1 and change is DAMAGE["one dimension"][0]:
        pytest.skip("it has one")
    refused({**published_v1, name: change(published_v1[name])}, message, num_attention_heads=HEADS)


@pytest.mark.parametrize("change", [lambda x: x[:0], lambda x: x[0], lambda x: huge(10**12), lambda x: x[None]])
@pytest.mark.parametrize("name", ["rope.freqs", "spatial_blocks.0.attn.q_norm.weight"])
def test_norms_and_frequencies_are_checked_too(published_v3, name, change):
    refused({**published_v3, name: change(published_v3[name])}, "shape|other rotary positions")


def test_a_norm_wider_than_the_model_is_refused(published_v3):
    refused({**published_v3, "spatial_blocks.0.attn.q_norm.weight": torch.ones(64)}, "another shape")


def test_tensors_that_share_their_values_are_refused(published_v1):
    """A file of one block's size would become a model of any number of blocks."""
    weight = published_v1["blocks.0.mlp.fc1.weight"]
    refused({**published_v1, "blocks.1.mlp.fc1.weight": weight}, "share values", num_attention_heads=HEADS)
    parts = torch.cat([weight, published_v1["blocks.1.mlp.fc1.weight"]]).chunk(2)  # of one storage, and all of it
    assert from_original(
        {**published_v1, "blocks.0.mlp.fc1.weight": parts[0], "blocks.1.mlp.fc1.weight": parts[1]},
        num_attention_heads=HEADS,
    )


def test_shapes_of_no_model_are_refused(published_v1):
    """Every tensor is there and small but for one row of numbers, and yet C x C is more than there are addresses."""
    width = 1 << 24
    wide = torch.ones(width, 1, 1, 1, 1, dtype=torch.float16)
    patches = {"x_embedder.proj.weight": wide, "final_layer.linear.weight": torch.ones(8, 1)}
    refused({**published_v1, **patches}, "another shape|make no model", num_attention_heads=HEADS)


@pytest.mark.parametrize("heads", [0, -1, 5, 10**30, "a", 2.0, True, [2]], ids=str)
def test_heads_that_do_not_divide_the_width_are_refused(published_v1, heads):
    refused(published_v1, "num_attention_heads must divide the width, 32; got", num_attention_heads=heads)


@pytest.mark.parametrize("key", ["num_heads", "input_sq_size"])
@pytest.mark.parametrize("value", [0, -2, 10**30, "a", 2.0, None, True, [], {}], ids=str)
def test_a_config_that_says_no_number_is_refused(published_v3, tmp_path, key, value):
    save_file(published_v3, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2, key: value}))
    with pytest.raises(ValueError, match=rf"config.json is damaged: {key} is .*, expected a positive integer"):
        load_open_sora(tmp_path)


@pytest.mark.parametrize("text", ["[" * 10**5 + "]" * 10**5, '{"a":' * 10**5 + "1" + "}" * 10**5, "1" * 10**5, "\0"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none_is_refused(published_v3, tmp_path, file, text):
    save_file(published_v3, tmp_path / "shard.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=rf"{file} is damaged"):
        load_open_sora(tmp_path)


def test_a_pickle_of_two_kilobytes_is_no_terabyte(published_v1, tmp_path):
    name = "blocks.0.mlp.fc1.weight"
    torch.save({**published_v1, name: huge(10**6, 10**6)}, tmp_path / "stdit.pth")
    with spare_memory(SPARE), pytest.raises(ValueError, match=rf"{name} claims shape \[1000000, 1000000\]"):
        load_open_sora(tmp_path / "stdit.pth", num_attention_heads=HEADS)


# At random

SIZES = st.sampled_from([0, 1, 2, 3, 16, 31, 32, 96, 10**6, 10**9])


def addressable(shape):
    """Whether torch can make a tensor of it at all: strides are worked out of what has no elements too."""
    return math.prod(max(1, size) for size in shape) < 2**60


@st.composite
def tensors(draw, of):
    """A tensor in place of another: of other values, shape, strides, layout or dtype."""
    kind = draw(st.sampled_from(["shape", "expanded", "view", "dtype", "layout", "transposed", "slice"]))
    of = of if of.ndim and of.layout == torch.strided and of.device.type == "cpu" else torch.ones(2)
    if kind == "expanded":
        return huge(*draw(st.lists(SIZES, max_size=5).filter(addressable)))
    if kind == "shape":
        shape = draw(st.lists(SIZES, max_size=5).filter(addressable))
        return torch.ones(shape) if math.prod(shape) < 10**5 else torch.ones(draw(SIZES.filter(lambda n: n < 100)))
    if kind == "dtype":
        return of.to(draw(st.sampled_from([torch.int8, torch.bool, torch.complex64, torch.float16, torch.bfloat16])))
    if kind == "layout":
        return draw(st.sampled_from([lambda: of.to_sparse(), lambda: of.to("meta"), lambda: of[None]]))()
    if kind == "transposed":
        return of.movedim(0, -1)
    if kind == "slice":
        return of[draw(st.integers(0, len(of))) :]
    return torch.as_strided(of, of.shape, [draw(st.integers(0, 1)) for _ in of.shape])


NAMES = st.sampled_from(
    ["blocks.2.mlp.fc1.weight", "blocks.999999999.mlp.fc1.bias", "spatial_blocks.0.x", "", "rope.freqs"]
)


class Damage(NamedTuple):
    """A checkpoint and the names of what has been changed in it."""

    found: dict[str, Any]
    touched: set[str]

    def __repr__(self):
        tensors = ((name, self.found.get(name)) for name in sorted(self.touched))
        return ", ".join(f"{name}: {tensor is not None and tensor.shape}" for name, tensor in tensors)


@st.composite
def damaged(draw, published):
    """Up to three tensors changed, taken away, renamed or exchanged."""
    found, touched = dict(published), set()
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(found)))
        what = draw(st.sampled_from(["change", "change", "remove", "rename", "swap"]))
        touched.add(name)
        if what == "change":
            found[name] = draw(tensors(published.get(name, torch.ones(2))))
        elif what == "remove":
            del found[name]
        elif what == "rename":
            new = draw(NAMES)
            found[new] = found.pop(name)
            touched.add(new)
        else:
            other = draw(st.sampled_from(sorted(found)))
            found[name], found[other] = found[other], found[name]
            touched.add(other)
    return Damage(found, touched)


@pytest.mark.parametrize("version", ["published_v1", "published_v3"])
def test_a_damaged_checkpoint_is_refused_or_a_model_of_its_tensors(request, version):
    published = {name: tensor.float() for name, tensor in request.getfixturevalue(version).items()}
    whole = from_original(published, num_attention_heads=HEADS).state_dict()
    refusals = []

    @fuzzed(0.4)
    @given(damaged(published))
    def check(damage):
        found, touched = damage
        start = time.monotonic()
        try:
            with spare_memory(SPARE):
                loaded = from_original(found, num_attention_heads=HEADS).state_dict()
        except ValueError as error:
            assert str(error).strip()
            refusals.append(error)
            return
        finally:
            assert time.monotonic() - start < SECONDS
        assert loaded.keys() == whole.keys(), "of the same layout"
        assert all(tensor.dtype == torch.float32 for tensor in loaded.values())
        same = sum(torch.equal(loaded[name], whole[name]) for name in whole)
        assert len(whole) - same <= 3 * len(touched), "what was not touched is what it was"

    check()
    assert refusals


@fuzzed(0.2)
@given(content=st.dictionaries(st.sampled_from(["num_heads", "input_sq_size", "qk_norm_legacy", "x"]), JSON | NUMBERS))
def test_a_damaged_config_is_refused_or_followed(published_folder, content):
    (published_folder / "config.json").write_text(json.dumps(content))
    try:
        with spare_memory(SPARE):
            model = load_open_sora(published_folder)
    except ValueError as error:
        assert str(error).strip()
        return
    assert model.config.num_attention_heads == content.get("num_heads", 2)
    assert model.config.sample_size == content.get("input_sq_size", 512)


@pytest.fixture
def published_folder(published_v3, tmp_path):
    save_file(published_v3, tmp_path / "model.safetensors")
    return tmp_path
