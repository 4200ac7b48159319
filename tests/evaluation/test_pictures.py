# SPDX-License-Identifier: Apache-2.0
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusers_dq.evaluation import PictureSet

pixels = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)


@pytest.fixture(params=["npz", "folder"])
def pictures(request, tmp_path):
    if request.param == "npz":
        np.savez(tmp_path / "set.npz", pixels, mu=np.zeros(3))
        return PictureSet.open(tmp_path / "set.npz")
    for i, image in enumerate(pixels):
        (tmp_path / str(i // 4)).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / str(i // 4) / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return PictureSet.open(tmp_path)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(batch=st.integers(1, 9))
def test_batches_are_the_pictures_in_order(pictures, batch):
    parts = list(pictures.batches(batch))
    assert len(pictures) == 7 and pictures.size == (6, 5)
    assert [len(part) for part in parts] == [min(batch, 7 - i) for i in range(0, 7, batch)]
    np.testing.assert_array_equal(np.concatenate(parts), pixels)
    np.testing.assert_array_equal(pictures.first(batch), pixels[:batch])


def test_the_stamp_is_of_the_files(pictures):
    stamp = pictures.stamp()
    assert pictures.stamp() == stamp
    os.utime(pictures.files[-1], ns=(0, 0))
    assert pictures.stamp() != stamp


def test_grey_pictures_have_three_equal_channels(tmp_path):
    Image.fromarray(pixels[0, :, :, 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(PictureSet.open(tmp_path).first(1)[0], pixels[0, :, :, :1].repeat(3, -1))


def test_pictures_of_several_sizes_are_refused_by_name(tmp_path):
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    Image.fromarray(pixels[0, :4]).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b.png is of 4 x 5 pixels, the first picture of 6 x 5"):
        list(PictureSet.open(tmp_path).batches(2))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pixels / 255, r"arr_0 of .* is float64 \[7, 6, 5, 3\]; expected .* uint8"),
        (pixels[..., 0], r"is uint8 \[7, 6, 5\]"),
        (pixels[:0], r"is uint8 \[0, 6, 5, 3\]"),
        (np.array([{"a": 1}], dtype=object), "is object"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(tmp_path, array, message):
    np.savez(tmp_path / "set.npz", array)
    with pytest.raises(ValueError, match=message):
        PictureSet.open(tmp_path / "set.npz")


def test_what_is_no_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures: give a folder of PNG"):
        PictureSet.open(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no .png, .jpg or .jpeg file"):
        PictureSet.open(tmp_path)
    np.savez(tmp_path / "other.npz", images=pixels)
    with pytest.raises(ValueError, match="cannot be read .*arr_0"):
        PictureSet.open(tmp_path / "other.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="cannot be read"):
        PictureSet.open(tmp_path / "broken.npz")
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(ValueError, match="broken.png is no picture that can be read"):
        PictureSet.open(tmp_path)
