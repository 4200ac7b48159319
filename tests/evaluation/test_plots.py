# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from diffusers_dq.evaluation import image_grid
from diffusers_dq.evaluation.plots import layer_heatmap

rng = np.random.default_rng(0)


def find(canvas: np.ndarray, tile: np.ndarray) -> bool:
    """Whether the tile occurs in the canvas, pixel by pixel."""
    height, width, _ = tile.shape
    corners = np.argwhere((canvas == tile[0, 0]).all(-1))
    return any(np.array_equal(canvas[y : y + height, x : x + width], tile) for y, x in corners)


def test_every_picture_is_in_the_grid_enlarged_to_squares() -> None:
    rows = {label: rng.integers(0, 256, (3, 24, 32, 3)) / 255 for label in ("full precision", "RTN W8A8")}
    canvas = np.asarray(image_grid(rows))
    for images in rows.values():
        for image in (images * 255).round().astype(np.uint8):
            assert find(canvas, image.repeat(4, axis=0).repeat(4, axis=1))  # 32 pixels become 128
    assert (canvas[0] == 255).all() and (canvas[:, 0] == 255).all()


def test_large_pictures_keep_their_size_and_values_outside_are_clipped() -> None:
    image = torch.full((1, 130, 131, 3), 2.0)
    image[..., 0] = -1
    image[..., 1] = torch.nan
    expected = np.broadcast_to(np.array([0, 0, 255], dtype=np.uint8), (130, 131, 3))
    assert find(np.asarray(image_grid({"a": image})), expected)


def test_labels_and_captions_take_room() -> None:
    image = rng.random((2, 32, 32, 3))
    plain = image_grid({"a": image})
    assert image_grid({"a longer label": image}).width > plain.width
    assert image_grid({"a": image}, captions=["1 dB", "2 dB"]).height > plain.height


def test_what_does_not_fit_is_refused() -> None:
    image = rng.random((2, 32, 32, 3))
    for rows in ({}, {"a": image, "b": image[:1]}, {"a": image[..., 0]}, {"a": image[:0]}, {"a": image[..., :1]}):
        with pytest.raises(ValueError, match=r"n, H, W, 3"):
            image_grid(rows)
    with pytest.raises(ValueError, match="each of the 2 pictures, got 1"):
        image_grid({"a": image}, captions=["one"])


def test_heatmap_shows_long_models_and_numbers_that_are_not_finite(tmp_path: object) -> None:
    snr = rng.random((150, 50)) * 30
    snr[0, 0], snr[1, 1], snr[2] = np.inf, np.nan, np.nan
    names = [f"transformer_blocks.{i}.attn1.to_q" for i in range(150)]
    figure = layer_heatmap(dict(zip(names, snr, strict=True)), np.linspace(999, 0, 50))
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "0.attn1.to_q" and len(labels) <= 70 and len(axes.get_xticklabels()) <= 20
    figure.savefig(f"{tmp_path}/a.png")
    layer_heatmap({"only": np.array([np.inf])}, np.array([0.0])).savefig(f"{tmp_path}/b.png")
    with pytest.raises(ValueError, match="no layers"):
        layer_heatmap({}, np.array([0.0]))


def test_heatmap_leaves_matplotlibs_global_state_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    layer_heatmap({"a": np.array([1.0, 2.0])}, np.array([1.0, 0.0]))
    assert dict(matplotlib.rcParams) == before
