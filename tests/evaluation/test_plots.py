# SPDX-License-Identifier: Apache-2.0
import io
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image

import diffusers_dq as dq
from diffusers_dq.evaluation import image_grid
from diffusers_dq.evaluation.plots import (
    INK,
    activation_ranges,
    layer_heatmap,
    quality_against_size,
    save_figure,
)

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
            assert find(canvas[..., :3], image.repeat(4, axis=0).repeat(4, axis=1))  # 32 pixels become 128
    clear = [255, 255, 255, 0]
    assert (canvas[0] == clear).all() and (canvas[:, 0] == clear).all()


def test_large_pictures_keep_their_size_and_values_outside_are_clipped() -> None:
    image = torch.full((1, 130, 131, 3), 2.0)
    image[..., 0] = -1
    image[..., 1] = torch.nan
    expected = np.broadcast_to(np.array([0, 0, 255], dtype=np.uint8), (130, 131, 3))
    assert find(np.asarray(image_grid({"a": image}))[..., :3], expected)


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


def luminance(color: tuple[int, ...]) -> float:
    """Relative, of WCAG 2.2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_ink_can_be_read_on_white_and_on_black() -> None:
    assert 1.05 / (luminance(INK) + 0.05) >= 4.5 and (luminance(INK) + 0.05) / 0.05 >= 4.5  # WCAG's bar for text


@pytest.fixture(scope="module")
def grouped(dit_folder: Path, dit_statistics: Any) -> torch.nn.Module:
    """Three timestep groups."""
    pipe = DiTPipeline.from_pretrained(dit_folder)
    dq.quantize(pipe, dq.DQConfig("htg", groups=3), statistics=dit_statistics, progress=False)
    return pipe.transformer


def figures(statistics: Any, model: torch.nn.Module) -> dict[str, Any]:
    return {
        "heatmap": layer_heatmap({"a": np.arange(3.0), "b": np.ones(3)}, np.array([2.0, 1.0, 0.0])),
        "ranges": activation_ranges(statistics, model),
        "quality": quality_against_size({"a": (2_000_000, 30.0), "b": (1_000_000, np.inf)}),
    }


def test_figures_are_transparent_around_and_all_text_is_in_the_ink(
    dit_statistics: Any, grouped: torch.nn.Module, tmp_path: Path
) -> None:
    for name, figure in figures(dit_statistics, grouped).items():
        save_figure(figure, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            pixels = np.asarray(image.convert("RGBA"))
        assert (pixels[0, :, 3] == 0).all() and (pixels[:, 0, 3] == 0).all(), name
        solid = pixels[pixels[..., 3] == 255][:, :3]
        assert (solid == INK).all(axis=1).sum() > 500, "labels and frames"
        assert not (solid.max(axis=1) < 5).sum() > 0.01 * len(solid) or name == "heatmap", "no black text"
    assert not list(tmp_path.glob("*.tmp"))


def test_ranges_are_the_statistics_and_boundaries_the_models(dit_statistics: Any, grouped: torch.nn.Module) -> None:
    name = "transformer_blocks.1.attn1.to_q"
    figure = activation_ranges(dit_statistics, grouped, [name])
    signed, sizes = figure.axes
    site = dit_statistics.sites[name]
    timesteps = dit_statistics.timesteps.numpy()
    lines = {line.get_label(): line for line in sizes.get_lines()}
    assert np.array_equal(lines["median"].get_xdata(), timesteps)
    expected = torch.maximum(site.minimum.abs(), site.maximum.abs()).numpy()
    np.testing.assert_allclose(lines["median"].get_ydata(), np.median(expected, axis=1))
    envelope = signed.collections[0].get_paths()[0].vertices
    assert envelope[:, 1].max() == pytest.approx(float(site.maximum.max()))
    assert envelope[:, 1].min() == pytest.approx(float(site.minimum.min()))

    layer = grouped.get_submodule(name)
    row = grouped.timestep_boundaries[layer.layout.partition]
    expected = sorted(row[torch.isfinite(row)].tolist())
    assert len(expected) == 2
    for axes in figure.axes:
        drawn = [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == "--"]
        assert drawn == expected
        numbers = {text.get_text(): text.xy[0] for text in axes.texts}
        assert numbers["1"] > expected[1] > numbers["2"] > expected[0] > numbers["3"], "1 is the noisiest"
        assert axes.get_xlim()[0] > axes.get_xlim()[1], "noise is on the left"
    assert signed.get_title(loc="left") == f"{name}: 3 timestep groups"


def test_without_sites_those_are_shown_that_change_most_of_every_kind(
    dit_statistics: Any, grouped: torch.nn.Module
) -> None:
    titles = [axes.get_title(loc="left") for axes in activation_ranges(dit_statistics, grouped).axes[::2]]
    assert len(titles) == 4 and all(title.endswith(": 3 timestep groups") for title in titles)
    kinds = {title.partition(":")[0].split(".", 2)[2] for title in titles}
    assert len(kinds) >= 3
    plain = activation_ranges(dit_statistics, most=2)
    assert len(plain.axes) == 4 and not [line for line in plain.axes[0].get_lines() if line.get_linestyle() == "--"]

    changed = deepcopy(dit_statistics)
    name = "transformer_blocks.0.ff.net.2"
    changed.sites[name].maximum.mul_(torch.logspace(0, 3, len(changed.timesteps))[:, None])
    assert activation_ranges(changed, most=1).axes[0].get_title(loc="left") == name


def test_a_linear_stands_for_what_it_reads_and_an_unknown_one_is_refused(dit_statistics: Any) -> None:
    figure = activation_ranges(dit_statistics, sites=["transformer_blocks.0.attn1.to_v"])
    assert figure.axes[0].get_title(loc="left") == "transformer_blocks.0.attn1.to_q"
    with pytest.raises(ValueError, match="know no activation 'to_x'; known: transformer_blocks.0"):
        activation_ranges(dit_statistics, sites=["to_x"])
    with pytest.raises(ValueError, match="no activation to show"):
        activation_ranges(dit_statistics.at(torch.arange(10) == 0))


def test_quality_against_size_joins_what_nothing_beats() -> None:
    points = {"a": (1_000_000, 30.0), "b": (2_000_000, 40.0), "c": (2_500_000, 35.0), "equal": (4_000_000, np.inf)}
    axes = quality_against_size(points, reference_bytes=16_000_000).axes[0]
    front, *dots = axes.get_lines()
    assert front.get_xdata().tolist() == [1.0, 2.0, 4.0], "c is larger and worse than b"
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots[:3]] == [(1.0, 30.0), (2.0, 40.0), (2.5, 35.0)]
    assert dots[3].get_marker() == "^" and dots[3].get_ydata()[0] > 40
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["a: 30.0 dB", "b: 40.0 dB", "c: 35.0 dB", "equal: equal pictures"]
    assert axes.get_xlabel() == "weights of the transformer, MB (full precision: 16.00 MB)"
    assert "GB" in quality_against_size({"a": (3_000_000_000, 30.0)}).axes[0].get_xlabel()
    for wrong in ({}, {"a": (0, 30.0)}, {"a": (10, np.nan)}):
        with pytest.raises(ValueError, match="no models|expected a size"):
            quality_against_size(wrong)


def test_new_figures_leave_matplotlibs_global_state_alone(dit_statistics: Any, grouped: torch.nn.Module) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    for figure in figures(dit_statistics, grouped).values():
        figure.savefig(io.BytesIO())
    assert dict(matplotlib.rcParams) == before
