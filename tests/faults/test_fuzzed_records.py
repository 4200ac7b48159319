# SPDX-License-Identifier: Apache-2.0
"""JSON files and picture sets changed at random: read for what they say, or refused with a message that names the
file, in little memory. How many: fuzzing.py."""

import io
import json
import struct
import zipfile

import numpy as np
import pytest
from fuzzing import REFUSALS, changed, changes, fuzzed, refused, spare_memory
from hypothesis import given
from hypothesis import strategies as st

import diffusers_dq as dq
from diffusers_dq.search.record import Record

SPARE = 1 << 28  # bytes that reading a file of some kB may map
CONFIG = dq.DQConfig(
    "htg",
    weight_bits=4,
    groups=3,
    ema=0.9,
    guard_steps=(1, 1),
    overrides={"*.to_q": {"weight_bits": 8}},
    reconstruction={"warmup": 0.1},
    rounding="adaround",
    modules_to_not_convert=["proj"],
).to_dict()
RECORD = {"format_version": 1, "settings": {"weights": "crc", "steps": [1, 2]}, "values": {"a": 0.5, "b": "inf"}}
ABOUT = {"hardware": "x", "device": "cpu", "threads": 1, "versions": {}, "driver": None, "date": "", "commit": None}
TIMES = {"median_ms": 1.0, "quartile_low_ms": 0.5, "quartile_high_ms": 2}
PROFILE = {"ms": 1.0, "entries": [{"name": "a", "calls": 1, "ms": 0.5}]}
RESULTS = {
    "format_version": 1,
    "about": ABOUT | {"dirty": None, "settings": {"rounds": 1, "scope": "smoke", "cuda_graphs": False}},
    "bars": [],
    "groups": [
        {
            "kind": "gemm",
            "name": "64",
            "settings": {"model": "tiny", "m": 1, "n": 2, "k": 3},
            "rows": [{"name": "ours", "profile": PROFILE} | TIMES, {"name": "peer", "failed": "no"}],
        }
    ],
}
DEEP = ["[" * 10**5 + "]" * 10**5, '{"method":' * 10**5 + "1" + "}" * 10**5, "1" * 10**5, "", "\0", "\ud800"]


@st.composite
def texts(draw, content):
    """A JSON file with other values, or of other bytes."""
    kind = draw(st.sampled_from(["values", "values", "values", "cut", "flip", "deep"]))
    whole = json.dumps(content).encode()
    if kind == "values":
        return json.dumps(changed(content, draw(changes(content)))).encode()
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole) - 1))]
    if kind == "deep":
        return draw(st.sampled_from(DEEP)).encode(errors="surrogatepass")
    flipped = bytearray(whole)
    flipped[draw(st.integers(0, len(whole) - 1))] ^= draw(st.integers(1, 255))
    return bytes(flipped)


def read(load, path):
    """What is read, or None where it is refused."""
    try:
        with spare_memory(SPARE):
            return load(path)
    except REFUSALS as error:
        refused(error)
        return None


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed") / "file.json"


@fuzzed(0.4)
@given(text=texts(CONFIG))
def test_a_changed_config_is_refused_or_makes_the_config_it_says(path, text):
    path.write_bytes(text)
    config = read(dq.DQConfig.from_json_file, path)
    if config is not None:
        assert dq.DQConfig(**json.loads(text)) == config
        config.to_json_file(path)
        assert dq.DQConfig.from_json_file(path) == config


@fuzzed(0.3)
@given(text=texts(RECORD))
def test_a_changed_record_is_refused_or_holds_numbers(path, text):
    path.write_bytes(text)
    record = read(lambda path: Record(path, RECORD["settings"]), path)
    if record is not None:
        assert all(type(value) is float for value in record.values.values())
        assert json.loads(text)["settings"] == RECORD["settings"]
        record.value("another", lambda: 1.0)
        assert Record(path, RECORD["settings"]).values.keys() == record.values.keys()


@fuzzed(0.3)
@given(text=texts(RESULTS))
def test_changed_results_are_refused_or_kept(path, text):
    from diffusers_dq.benchmark.results import Results

    path.write_bytes(text)
    results = read(Results.load, path)
    if results is not None:
        said = json.loads(text)
        assert (results.about, results.groups, results.bars) == (said["about"], said["groups"], said["bars"])
        assert not results.holds("gemm", "another", {})
        results.int8_peak()


def test_what_is_changed_was_sound(path):
    from diffusers_dq.benchmark.results import Results

    for load, content in {
        dq.DQConfig.from_json_file: CONFIG,
        Results.load: RESULTS,
        lambda path: Record(path, RECORD["settings"]): RECORD,
    }.items():
        path.write_text(json.dumps(content))
        assert load(path) is not None


@pytest.mark.parametrize("text", DEEP, ids=range(len(DEEP)))
def test_what_is_no_json_is_named(path, text):
    from diffusers_dq.benchmark.results import Results
    from diffusers_dq.evaluation.pictures import PictureSet

    settings = path.with_name("settings.json")
    for file in (path, settings):
        file.write_bytes(text.encode(errors="surrogatepass"))
    loads = {dq.DQConfig.from_json_file: path, Results.load: path, PictureSet.open: settings.parent}
    for load, place in {**loads, (lambda path: Record(path, {})): path}.items():
        with pytest.raises(ValueError, match=r"file\.json|settings\.json"):
            load(place)
    settings.unlink()


# Pictures

SETTINGS = {"images": 4, "batch": 2, "seed": 0, "prompts": ["a"]}
PIXELS = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


@st.composite
def archives(draw):
    """An .npz whose arr_0 has another header than its bytes, is packed otherwise, or whose bytes are flipped."""
    buffer = io.BytesIO()
    kind = draw(st.sampled_from(["header", "header", "flip", "cut", "name", "method"]))
    sizes = st.sampled_from([-2, 0, 1, 2, 3, 4, 10**6, 10**9, 10**12, 10**30, True, "x"])
    shape = tuple(draw(st.lists(sizes, max_size=5))) if kind == "header" else PIXELS.shape
    dtype = draw(st.sampled_from(["|u1", "|u1", "<f8", "|O", "|V3", "nonsense"])) if kind == "header" else "|u1"
    header = repr({"descr": dtype, "fortran_order": draw(st.booleans()), "shape": shape}).encode() + b"\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + PIXELS.tobytes()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("arr_1.npy" if kind == "name" else "arr_0.npy", array)
    content = bytearray(buffer.getvalue())
    if kind == "cut":
        return bytes(content[: draw(st.integers(0, len(content) - 1))])
    if kind == "flip":
        content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
    if kind == "method":
        method = struct.pack("<H", draw(st.sampled_from([1, 8, 12, 14, 99])))
        for place in (8, content.rindex(b"PK\x01\x02") + 10):  # in the file's header, and in the archive's directory
            content[place : place + 2] = method
    return bytes(content)


@fuzzed(0.4)
@given(archive=archives())
def test_a_damaged_archive_of_pictures_is_refused_or_of_its_size(path, archive):
    from diffusers_dq.evaluation.pictures import PictureSet

    file = path.with_name("pictures.npz")
    file.write_bytes(archive)
    pixels = read(lambda file: next(PictureSet.open(file).batches(2)), file)
    if pixels is not None:
        assert (
            pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[-1] == 3 and pixels.nbytes <= PIXELS.nbytes
        )


@fuzzed(0.2)
@given(text=texts(SETTINGS))
def test_settings_of_pictures_are_refused_or_followed(tmp_path_factory, text):
    from diffusers_dq.evaluation.pictures import PictureSet, batch_file

    folder = tmp_path_factory.getbasetemp() / "picture-set"
    folder.mkdir(exist_ok=True)
    for first in (0, 2):
        np.savez(batch_file(folder, first), PIXELS)
    (folder / "settings.json").write_bytes(text)
    pictures = read(PictureSet.open, folder)
    if pictures is not None:
        said = json.loads(text)
        assert len(pictures) == said["images"] and said["batch"] * len(pictures.files) >= said["images"]
