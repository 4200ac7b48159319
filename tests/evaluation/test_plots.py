# SPDX-License-Identifier: Apache-2.0
import io
import json
from copy import deepcopy
from dataclasses import replace
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


def places(canvas: np.ndarray, tile: np.ndarray) -> list[tuple[int, int]]:
    """(top, left) of each place where the tile occurs in the canvas, pixel by pixel."""
    height, width, _ = tile.shape
    corners = np.argwhere((canvas == tile[0, 0]).all(-1))
    return [(y, x) for y, x in corners if np.array_equal(canvas[y : y + height, x : x + width], tile)]


def find(canvas: np.ndarray, tile: np.ndarray) -> bool:
    return bool(places(canvas, tile))


def test_every_picture_is_in_the_grid_enlarged_to_squares() -> None:
    rows = {label: rng.integers(0, 256, (3, 24, 32, 3)) / 255 for label in ("full precision", "RTN W8A8")}
    canvas = np.asarray(image_grid(rows))
    for images in rows.values():
        for image in (images * 255).round().astype(np.uint8):
            assert find(canvas[..., :3], image.repeat(4, axis=0).repeat(4, axis=1))  # 32 pixels become 128
    clear = [255, 255, 255, 0]
    assert (canvas[0] == clear).all() and (canvas[:, 0] == clear).all()


def test_rows_are_in_order_from_top_and_left_each_beside_its_label() -> None:
    rows = {"a label that is long": rng.random((3, 16, 16, 3)), ".": rng.random((3, 16, 16, 3))}
    canvas = np.asarray(image_grid(rows, captions=["", "1 dB", ""]))
    tops, lefts = [], []
    for images in rows.values():
        for image in (images * 255).round().astype(np.uint8):
            ((top, left),) = places(canvas[..., :3], image.repeat(8, axis=0).repeat(8, axis=1))
            tops.append(top)
            lefts.append(left)
    assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4] == tops[5]
    assert lefts[0] < lefts[1] < lefts[2] and lefts[:3] == lefts[3:]
    ink = (canvas[..., 3] > 0).astype(int)
    beside = [ink[top : top + 128, : lefts[0]].sum() for top in (tops[0], tops[3])]
    assert beside[0] > 10 * beside[1] > 0, "the long label is the first row's"
    below = [ink[tops[3] + 128 :, left : left + 128].sum() for left in lefts[:3]]
    assert below[0] == below[2] == 0 < below[1], "the caption is the second column's"


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


def test_a_field_of_the_heatmap_is_the_linear_of_its_row_at_the_timestep_of_its_column() -> None:
    snr = {"blocks.0.a": np.array([30.0, 20.0, 10.0]), "blocks.0.b": np.array([5.0, np.nan, 1.0])}
    axes, bar = layer_heatmap(snr, np.array([900.0, 500.0, 100.0])).axes
    (mesh,) = axes.collections
    shown = np.ma.filled(mesh.get_array(), np.nan)
    corners = mesh.get_coordinates()  # [rows + 1, columns + 1, 2]
    ticks = [
        {label.get_text(): place for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)}
        for axis in (axes.xaxis, axes.yaxis)
    ]
    for name, values in snr.items():
        for timestep, value in zip((900, 500, 100), values, strict=True):
            x, y = ticks[0][str(timestep)], ticks[1][name.removeprefix("blocks.0.")]
            row, column = int(np.searchsorted(corners[:, 0, 1], y)) - 1, int(np.searchsorted(corners[0, :, 0], x)) - 1
            np.testing.assert_equal(shown[row, column], value)
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first linear is on top"
    assert axes.get_xlim()[0] < axes.get_xlim()[1], "the first step is on the left"

    assert (mesh.norm.vmin, mesh.norm.vmax) == tuple(np.percentile([30, 20, 10, 5, 1], (1, 99)))
    shades = [luminance(mesh.cmap(value)[:3], of=1.0) for value in np.linspace(0, 1, 11)]
    assert bar.get_ylabel() == "SNR of the output, dB (dark: worse)"
    assert shades == sorted(shades) and shades[-1] > 10 * shades[0], "a low SNR is dark"
    assert bar.get_ylim() == (mesh.norm.vmin, mesh.norm.vmax), "and at the lower end of the bar"
    assert mesh.cmap.get_bad()[:3].tolist() == [0.5, 0.5, 0.5]


def test_heatmap_leaves_matplotlibs_global_state_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    layer_heatmap({"a": np.array([1.0, 2.0])}, np.array([1.0, 0.0]))
    assert dict(matplotlib.rcParams) == before


def luminance(color: tuple[float, ...], of: float = 255) -> float:
    """Relative, of WCAG 2.2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / of for v in color)]
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


def by_timestep(collection: Any) -> dict[float, tuple[float, float]]:
    """Timestep -> lower and upper edge of what fill_between drew."""
    vertices = collection.get_paths()[0].vertices
    return {x: (y.min(), y.max()) for x in np.unique(vertices[:, 0]) for y in [vertices[vertices[:, 0] == x, 1]]}


def close(drawn: dict[float, tuple[float, float]], timesteps: Any, low: Any, high: Any) -> bool:
    expected = dict(zip(timesteps.tolist(), zip(low.tolist(), high.tolist(), strict=True), strict=True))
    return drawn.keys() == expected.keys() and all(np.allclose(drawn[t], expected[t]) for t in expected)


def test_ranges_are_the_statistics_at_their_timesteps(dit_statistics: Any) -> None:
    name = "transformer_blocks.1.attn1.to_q"
    statistics = deepcopy(dit_statistics)
    site = statistics.sites[name]
    site.minimum[4], site.maximum[4] = torch.inf, -torch.inf  # a step that did not reach it is not drawn
    signed, sizes = activation_ranges(statistics, sites=[name]).axes
    timesteps, low, high = (x[site.visited].numpy() for x in (statistics.timesteps, site.minimum, site.maximum))
    assert len(timesteps) == 9 and len(set(timesteps.tolist())) == 9

    bands = {band.get_label(): by_timestep(band) for band in signed.collections}
    assert close(bands.pop("all channels"), timesteps, low.min(1), high.max(1))
    edges = np.percentile(low, 5, axis=1), np.percentile(high, 95, axis=1)
    assert close(bands.pop("5th percentile of minima to 95th of maxima"), timesteps, *edges) and not bands
    lines = [line for line in signed.get_lines() if line.get_linestyle() != ":"]
    dotted = [line for line in signed.get_lines() if line.get_linestyle() == ":"]
    middle = (low + high) / 2
    moved = np.argsort(np.ptp(middle, axis=0))[::-1][:3]
    assert len(lines) == 3 and len(dotted) == 6
    for line, channel in zip(lines, moved, strict=True):
        np.testing.assert_allclose(line.get_xydata(), np.stack([timesteps, middle[:, channel]], 1), rtol=1e-6)
    for line, edge in zip(dotted, (edge[:, c] for c in moved for edge in (low, high)), strict=True):
        np.testing.assert_allclose(line.get_xydata(), np.stack([timesteps, edge], 1), rtol=1e-6)

    largest = np.maximum(abs(low), abs(high))
    bands = {band.get_label(): by_timestep(band) for band in sizes.collections}
    assert close(bands["5 to 95 % of channels"], timesteps, *np.percentile(largest, (5, 95), axis=1))
    assert close(bands["25 to 75 %"], timesteps, *np.percentile(largest, (25, 75), axis=1))
    median, *channels = sizes.get_lines()
    np.testing.assert_allclose(median.get_xydata(), np.stack([timesteps, np.median(largest, axis=1)], 1), rtol=1e-6)
    for line, channel in zip(channels, np.argsort(-largest.max(0))[:3], strict=True):
        np.testing.assert_allclose(line.get_xydata(), np.stack([timesteps, largest[:, channel]], 1), rtol=1e-6)


@pytest.mark.parametrize("descending", [True, False])
def test_boundaries_are_the_models(dit_statistics: Any, grouped: torch.nn.Module, descending: bool) -> None:
    name = "transformer_blocks.1.attn1.to_q"
    statistics = deepcopy(dit_statistics)
    if not descending:  # a model whose picture is at the largest timestep
        statistics = replace(statistics, timesteps=statistics.timesteps.flip(0))
    figure = activation_ranges(statistics, grouped, [name])
    row = grouped.timestep_boundaries[grouped.get_submodule(name).layout.partition]
    expected = sorted(row[torch.isfinite(row)].tolist())
    assert len(expected) == 2
    edges = [float(statistics.timesteps.min()), *expected, float(statistics.timesteps.max())]
    centres = [(edges[i] + edges[i + 1]) / 2 for i in range(3)]
    for axes in figure.axes:
        drawn = [line.get_xdata() for line in axes.get_lines() if line.get_linestyle() == "--"]
        assert [list(xs) for xs in drawn] == [[x, x] for x in expected]
        numbers = {text.get_text(): text.xy[0] for text in axes.texts}
        assert [numbers[n] for n in "123"] == (centres[::-1] if descending else centres), "1 is the noisiest"
        left, right = axes.get_xlim()
        assert (left > right) == descending, "noise is on the left"
    assert figure.axes[0].get_title(loc="left") == f"{name}: 3 timestep groups"


def test_every_line_and_area_of_the_ranges_is_in_the_legend(dit_statistics: Any, grouped: torch.nn.Module) -> None:
    figure = activation_ranges(dit_statistics, grouped)
    for column in (figure.axes[::2], figure.axes[1::2]):
        (legend,) = [axes.get_legend() for axes in column if axes.get_legend() is not None]
        explained = {(line.get_color(), line.get_linestyle()) for line in legend.get_lines()}
        drawn = {(line.get_color(), line.get_linestyle()) for axes in column for line in axes.get_lines()}
        assert drawn == explained and len(drawn) > 2
        areas = {area.get_label() for axes in column for area in axes.collections}
        assert len(areas) == 2 and areas <= {text.get_text() for text in legend.get_texts()}


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


DEMO = Path(__file__).parents[2] / "examples" / "results" / "demo.json"


@pytest.mark.parametrize("which", ["demo", "crowd", "close"])
def test_a_label_covers_no_line_no_point_and_no_other_label(which: str) -> None:
    points = {f"model {i}": (1_000_000 + 2000 * (i % 3), 30.0 + i / 3) for i in range(9)}
    if which == "demo":
        models = json.loads(DEMO.read_text())["models"]
        points = {name: (row["bytes"], row["psnr_db"]) for name, row in models.items() if row["psnr_db"]}
    if which == "close":
        points = {"a": (1_000_000, 30.0), "b": (1_030_000, 30.1), "c": (1_900_000, 40.0), "d": (2_000_000, 40.1)}
    figure = quality_against_size(points)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    front, *dots = axes.get_lines()
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert len(boxes) == len(points)
    path = front.get_path().transformed(front.get_transform())  # the steps, in pixels
    assert len(path.vertices) > 3
    centres = [axes.transData.transform(dot.get_xydata()[0]) for dot in dots]
    for label, box in boxes.items():
        assert not path.intersects_bbox(box, filled=False), f"{label} is on the line"
        assert not any(box.contains(*centre) for centre in centres), f"{label} is on a point"
        assert not any(box.overlaps(other) for name, other in boxes.items() if name != label), label
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1, f"{label} is outside"
        own = centres[list(boxes).index(label)]
        assert abs(np.clip(own, box.min, box.max) - own).max() < 20 * figure.dpi / 72, f"{label} is far from its point"


def test_new_figures_leave_matplotlibs_global_state_alone(dit_statistics: Any, grouped: torch.nn.Module) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    for figure in figures(dit_statistics, grouped).values():
        figure.savefig(io.BytesIO())
    assert dict(matplotlib.rcParams) == before
