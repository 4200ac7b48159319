# SPDX-License-Identifier: Apache-2.0
"""Pictures of pictures, of errors by layer and step, of activations over the steps, and of quality against size.

All have a transparent ground and one grey ink, whose contrast is 4.5 to white and 4.6 to black: one file is readable
on a light page and on a dark one.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from diffusers_dq.evaluation.metrics import Array, Pictures, optional
from diffusers_dq.files import write_whole
from diffusers_dq.installation import BOUNDARIES
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.statistics import SiteStatistics, Statistics

INK = (118, 118, 118)
_INK_NAME = "#767676"
_BLUE, _RED, _ORANGE = "#3d8fd6", "#e0473f", "#e8871e"  # visible on white and on black
_CLEAR = (255, 255, 255, 0)  # white, for a reader that drops the transparency
_TILE = 128  # pixels that the longer side of a small picture is brought to
_GAP = 6
_MARGIN = 12
_PLACES = [(x, y) for y in (0, -10, 10, -16, 16, -24, 24) for x in (8, -8)]  # of a label beside its point; 1/72 inch


def image_grid(rows: Mapping[str, Pictures], *, captions: Sequence[str] = ()) -> Image.Image:
    """A labelled row of pictures for each entry, RGBA on a transparent ground.

    rows: label -> [n, H, W, 3] in [0, 1], clipped where outside, all of one shape. Pictures smaller than 128 pixels
        are enlarged by an integer factor, each pixel a square.
    captions: a text below each column.

    Raises ValueError where there is nothing to show, or shapes or the number of captions do not fit.
    """
    tiles = {label: _to_bytes(images) for label, images in rows.items()}
    n, height, width = _common_shape(tiles)
    if captions and len(captions) != n:
        raise ValueError(f"expected a caption for each of the {n} pictures, got {len(captions)}")

    factor = max(1, -(-_TILE // max(height, width)))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(size=max(13, min(28, width // 12)))
    label_width = max(_text_size(label, font)[0] for label in tiles)
    caption_height = max((_text_size(caption, font)[1] + _GAP for caption in captions), default=0)
    left = _MARGIN + label_width + _MARGIN
    right = left + n * (width + _GAP) - _GAP
    bottom = _MARGIN + len(tiles) * (height + _GAP) - _GAP + caption_height
    canvas = Image.new("RGBA", (right + _MARGIN, bottom + _MARGIN), _CLEAR)
    draw = ImageDraw.Draw(canvas)
    top = _MARGIN
    for label, images in tiles.items():
        draw.text((left - _MARGIN, top + height // 2), label, fill=INK, font=font, anchor="rm")
        for i, image in enumerate(images):
            tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + i * (width + _GAP), top))
        top += height + _GAP
    for i, caption in enumerate(captions):
        centre = left + i * (width + _GAP) + width // 2
        draw.multiline_text((centre, top), caption, fill=INK, font=font, anchor="ma", align="center")
    return canvas


def _common_shape(rows: Mapping[str, npt.NDArray[np.uint8]]) -> tuple[int, int, int]:
    shapes = {images.shape for images in rows.values()}
    if len(shapes) == 1:
        (shape,) = shapes
        if len(shape) == 4 and shape[-1] == 3 and 0 not in shape:
            return shape[:3]
    raise ValueError(f"expected rows of pictures [n, H, W, 3], all of one shape, got {sorted(shapes)}")


def _to_bytes(images: Pictures) -> npt.NDArray[np.uint8]:
    pixels = torch.as_tensor(images).detach().cpu().double().nan_to_num().clamp(0, 1) * 255
    return pixels.round().byte().numpy()


def _text_size(text: str, font: Any) -> tuple[int, int]:
    *_, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return int(right), int(bottom)


def layer_heatmap(layer_snr: Mapping[str, Array], timesteps: Array) -> Any:
    """SNR of each linear's output at each step, as a matplotlib Figure: linears from top to bottom in the order of the
    mapping, steps from left to right in the order of the run.

    layer_snr: linear -> [S] dB.   timesteps: [S]. Grey where not finite. Raises ValueError for an empty mapping,
    ImportError without matplotlib.
    """
    if not layer_snr:
        raise ValueError("no layers to show; was compare called with layers=False, or is no linear quantized?")
    matplotlib = optional("matplotlib")
    table = np.ma.masked_invalid(np.stack(list(layer_snr.values())))  # [linears, S]
    names = _short_names(list(layer_snr))
    height = float(np.clip(1.4 + 0.17 * len(names), 3, 14))
    figure = _figure(width=9, height=height)
    with _inked():
        axes = figure.add_subplot()
    colormap = matplotlib.colormaps["magma"].with_extremes(bad="0.5")
    low, high = _color_range(table)
    image = axes.pcolormesh(table, cmap=colormap, vmin=low, vmax=high)
    bar = figure.colorbar(image, ax=axes, extend="both", pad=0.02)
    bar.set_label("SNR of the output, dB (dark: worse)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    _ink(bar.ax)

    every = -(-len(names) // 70)
    axes.set_yticks(np.arange(0, len(names), every) + 0.5, names[::every], fontsize=7)
    every = -(-len(timesteps) // 20)
    axes.set_xticks(np.arange(0, len(timesteps), every) + 0.5, [f"{t:g}" for t in timesteps[::every]], fontsize=8)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_xlabel("timestep, from noise to picture")
    axes.set_title("Error of the quantized linears on the full-precision trajectory", fontsize=10)
    _ink(axes)
    return figure


def _color_range(table: Any) -> tuple[float, float]:
    """From the 1st to the 99th percentile: one outlier does not blind the rest."""
    values = table.compressed()
    return tuple(np.percentile(values, (1, 99))) if len(values) else (0.0, 1.0)


def _short_names(names: Sequence[str]) -> list[str]:
    """Without the dotted parts that all begin with."""
    common = os.path.commonprefix(list(names)).rpartition(".")
    return [name.removeprefix(common[0] + common[1]) for name in names]


def activation_ranges(
    statistics: Statistics, model: nn.Module | None = None, sites: Sequence[str] = (), *, most: int = 4
) -> Any:
    """What activations do over the timesteps, and where a quantized model changes its parameters, as a matplotlib
    Figure: a row an activation, from noise on the left to the picture on the right.

    Left, as HTG's figure 1: from the lowest minimum of a channel to the highest maximum, from the 5th percentile of
    the minima to the 95th of the maxima, and middle, minimum and maximum (dotted) of the three channels whose middle
    moves most. Right, as PTQ4DiT's figure 4: how max |x| is spread over the channels, and the three largest, on a
    logarithmic axis.
    model: a quantized transformer; dashed lines are the group boundaries of the linears that read the activation,
        numbers their groups from noise on.
    sites: names in `statistics.sites`, or of linears that read them; by default the `most` inputs of linears whose
        channels change most over the steps: of those that have groups, where the model has any, and of every kind the
        one that changes most before the second of a kind.

    Raises ValueError for an unknown site, or where no activation was seen at two steps; ImportError without
    matplotlib.
    """
    grouped = {} if model is None else {n: _boundaries(model, s.linears) for n, s in statistics.sites.items()}
    chosen = [_site_of(statistics, name) for name in sites] or _most_changing(statistics, grouped, most)
    if not chosen:
        raise ValueError("no activation to show: the statistics hold no input of a linear that two steps reached")
    figure = _figure(width=11, height=1.0 + 2.0 * len(chosen))
    timesteps = statistics.timesteps.numpy()
    with _inked():
        panels = figure.subplots(len(chosen), 2, sharex=True, squeeze=False)
    for row, name in zip(panels, chosen, strict=True):
        boundaries = grouped.get(name, [])
        groups = f": {len(boundaries) + 1} timestep group{'s' * bool(boundaries)}" if model is not None else ""
        row[0].set_title(f"{name}{groups}", fontsize=9, loc="left", pad=12)
        _draw_signed(row[0], timesteps, statistics.sites[name])
        _draw_magnitudes(row[1], timesteps, statistics.sites[name])
        for axes in row:
            _draw_groups(axes, timesteps, boundaries, statistics.descending)
            axes.tick_params(which="both", labelsize=7)
            _ink(axes)
    if statistics.descending:
        panels[0, 0].invert_xaxis()
    for column, title in zip(panels.T, ("range of channels", "max |x| of a channel"), strict=True):
        column[-1].set_xlabel("timestep, from noise to picture", fontsize=8)
        handles: dict[str, Any] = {}
        for axes in column:
            axes.set_ylabel(title, fontsize=8)
            drawn, labels = axes.get_legend_handles_labels()
            handles |= dict(zip(labels, drawn, strict=True))
        column[-1].legend(
            handles.values(), handles.keys(), fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=2,
            frameon=False, labelcolor=_INK_NAME, columnspacing=1.2,
        )  # fmt: skip
    return figure


def quality_against_size(points: Mapping[str, tuple[int, float]], *, reference_bytes: int | None = None) -> Any:
    """PSNR against the bytes of the weights, a point a quantized model, as a matplotlib Figure.

    points: label -> (bytes, dB); a PSNR of inf, of pictures that are equal, is drawn as a triangle on the upper edge.
    reference_bytes: of the model in full precision, which the axis names.

    Points that no other beats in both are joined. Raises ValueError without points or for NaN or sizes that are not
    positive, ImportError without matplotlib.
    """
    if not points:
        raise ValueError("no models to show; expected label -> (bytes, dB) of at least one")
    for label, (nbytes, decibels) in points.items():
        if nbytes <= 0 or np.isnan(decibels):
            raise ValueError(f"{label} has {nbytes} bytes and a PSNR of {decibels}; expected a size and dB")
    figure = _figure(width=7, height=4.4)
    with _inked():
        axes = figure.add_subplot()
    unit, scale = ("GB", 1e9) if max(nbytes for nbytes, _ in points.values()) >= 1e9 else ("MB", 1e6)
    finite = [decibels for _, decibels in points.values() if np.isfinite(decibels)]
    ceiling = max(finite, default=60.0) + 4
    drawn = {label: (nbytes / scale, min(decibels, ceiling)) for label, (nbytes, decibels) in points.items()}
    front = _front(drawn.values())
    axes.plot(
        *zip(*front, strict=True), color=_INK_NAME, linewidth=1, linestyle=":", alpha=0.7, drawstyle="steps-post",
        label="no other beats these",
    )  # fmt: skip
    texts = {}
    for i, (label, (size, decibels)) in enumerate(drawn.items()):
        equal = not np.isfinite(points[label][1])
        axes.plot(size, decibels, "^" if equal else "o", color=f"C{i % 10}", markersize=8, label="_")
        texts[f"{label}: equal pictures" if equal else f"{label}: {decibels:.1f} dB"] = (size, decibels)
    sizes = [size for size, _ in drawn.values()]
    spread = max(sizes) - min(sizes) or 0.2 * max(sizes)
    axes.set_xlim(min(sizes) - 0.1 * spread, max(sizes) + 0.5 * spread)  # room for a label on the right
    axes.margins(y=0.15)
    full = f" (full precision: {reference_bytes / scale:,.2f} {unit})" if reference_bytes else ""
    axes.set_xlabel(f"weights of the transformer, {unit}{full}", fontsize=9)
    axes.set_ylabel("PSNR to full precision, dB", fontsize=9)
    axes.set_title("Quality against size, same seeds", fontsize=10)
    axes.tick_params(labelsize=8)
    figure.legend(fontsize=8, frameon=False, labelcolor=_INK_NAME, loc="outside lower center")
    _ink(axes)
    _write_beside(axes, texts, front)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """As PNG, whole or not at all, on a transparent ground."""
    write_whole(path, lambda file: figure.savefig(file, format="png", transparent=True))


def _front(points: Any) -> list[tuple[float, float]]:
    """Those that no other is both smaller and better than, by size."""
    front: list[tuple[float, float]] = []
    for size, decibels in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or decibels > front[-1][1]:
            front.append((size, decibels))
    return front


def _write_beside(axes: Any, texts: Mapping[str, tuple[float, float]], front: Sequence[tuple[float, float]]) -> None:
    """Each text beside its point, where there is room: on no other text or point, not on the front's line, within the
    axes. Where there is none, where least is covered."""
    box = optional("matplotlib.transforms").Bbox
    axes.figure.draw_without_rendering()  # the layout is settled: data have their place in pixels
    corners = [point for (x, y), (further, _) in zip(front, [*front[1:], front[-1]], strict=True)
               for point in ((x, y), (further, y))]  # fmt: skip
    line = optional("matplotlib.path").Path(axes.transData.transform(corners))
    pixels = axes.figure.dpi / 72  # a point
    centres = {text: axes.transData.transform(point) for text, point in texts.items()}
    taken = [box.from_extents(*(at - 5 * pixels), *(at + 5 * pixels)) for at in centres.values()]
    for text, point in texts.items():
        note = axes.annotate(
            text, point, xytext=(0, 0), textcoords="offset points", fontsize=8, color=_INK_NAME, va="center"
        )
        size = note.get_window_extent()

        def placed(place: tuple[int, int], at: Any = centres[text], size: Any = size) -> Any:
            left = at[0] + place[0] * pixels - (size.width if place[0] < 0 else 0)
            bottom = at[1] + place[1] * pixels - size.height / 2
            return box.from_bounds(left, bottom, size.width, size.height)

        def covered(place: tuple[int, int], placed: Any = placed) -> int:
            here = placed(place).padded(2 * pixels)
            crosses = line.intersects_bbox(here, filled=False)
            outside = not (axes.bbox.x0 <= here.x0 and here.x1 <= axes.bbox.x1)
            return sum(map(here.overlaps, taken)) + crosses + outside

        best = min(_PLACES, key=covered)
        note.set_position(best)
        note.set_horizontalalignment("right" if best[0] < 0 else "left")
        taken.append(placed(best))


def _figure(width: float, height: float) -> Any:
    figure = optional("matplotlib.figure").Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.patch.set_alpha(0)
    return figure


@contextmanager
def _inked() -> Any:
    """No change of matplotlib's global state outlives it."""
    with optional("matplotlib").rc_context({"axes.facecolor": "none", "text.color": _INK_NAME}):
        yield


def _ink(axes: Any) -> None:
    axes.patch.set_alpha(0)
    for text in (axes.title, axes._left_title, axes._right_title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(_INK_NAME)
    axes.tick_params(which="both", colors=_INK_NAME)
    for spine in axes.spines.values():
        spine.set_color(_INK_NAME)


def _site_of(statistics: Statistics, name: str) -> str:
    if name in statistics.sites:
        return name
    for site, seen in statistics.sites.items():
        if name in seen.linears:
            return site
    raise ValueError(
        f"the statistics know no activation {name!r}; known: {', '.join(list(statistics.sites)[:8])}, ..."
    )


def _most_changing(statistics: Statistics, grouped: Mapping[str, Sequence[float]], most: int) -> list[str]:
    """In the order of the model."""
    change = {}
    for name, site in statistics.sites.items():
        if site.linears and int(site.visited.sum()) > 1:
            sizes = np.log(np.clip(_magnitudes(site)[site.visited.numpy()], 1e-6, None))  # [S, K]
            change[name] = float(np.median(sizes.std(axis=0)))
    candidates = sorted([name for name in change if grouped.get(name)] or change, key=lambda name: -change[name])
    ranks: dict[str, int] = {}
    seen: Counter[str] = Counter()
    for name in candidates:
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        ranks[name] = seen[kind]
        seen[kind] += 1
    chosen = sorted(candidates, key=lambda name: ranks[name])[:most]
    return [name for name in change if name in chosen]


def _magnitudes(site: SiteStatistics) -> Array:
    """[S, K] max |x| of each channel at each step; NaN where the site was not reached."""
    sizes = torch.maximum(site.minimum.abs(), site.maximum.abs())
    return torch.where(site.visited[:, None], sizes, torch.nan).numpy()


def _boundaries(model: nn.Module, linears: Sequence[str]) -> list[float]:
    """Of the first of the linears that is quantized: timesteps, ascending; [] for a single group."""
    table = getattr(model, BOUNDARIES, None)  # [P, E]
    layers = [module for name, module in model.named_modules() if name in linears]
    quantized = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    if table is None or not quantized:
        return []
    layout = quantized[0].layout
    if max(layout.bias_groups, layout.range_groups, layout.shift_groups) < 2:
        return []
    row = table[layout.partition].float().cpu()
    return row[torch.isfinite(row)].tolist()


def _draw_signed(axes: Any, timesteps: Array, site: SiteStatistics) -> None:
    seen = site.visited
    x, low, high = timesteps[seen.numpy()], site.minimum[seen].numpy(), site.maximum[seen].numpy()  # [S], [S, K]
    axes.fill_between(x, low.min(axis=1), high.max(axis=1), color=_BLUE, alpha=0.3, linewidth=0, label="all channels")
    inner = np.percentile(low, 5, axis=1), np.percentile(high, 95, axis=1)
    label = "5th percentile of minima to 95th of maxima"
    axes.fill_between(x, *inner, color=_BLUE, alpha=0.5, linewidth=0, label=label)
    middle = (low + high) / 2
    for channel in np.argsort(middle.min(axis=0) - middle.max(axis=0))[:3]:
        axes.plot(x, middle[:, channel], color=_ORANGE, linewidth=1.2, label="3 channels that move most: middle")
        edges = low[:, channel], x, high[:, channel]
        axes.plot(x, *edges, color=_ORANGE, linewidth=0.9, linestyle=":", label="their minima and maxima")


def _draw_magnitudes(axes: Any, timesteps: Array, site: SiteStatistics) -> None:
    seen = site.visited.numpy()
    x, sizes = timesteps[seen], np.clip(_magnitudes(site)[seen], 1e-6, None)  # [S], [S, K]
    low, quarter, median, three, high = np.percentile(sizes, (5, 25, 50, 75, 95), axis=1)  # [S] each
    axes.fill_between(x, low, high, color=_BLUE, alpha=0.3, linewidth=0, label="5 to 95 % of channels")
    axes.fill_between(x, quarter, three, color=_BLUE, alpha=0.5, linewidth=0, label="25 to 75 %")
    axes.plot(x, median, color=_BLUE, linewidth=1.5, label="median")
    for channel in np.argsort(-sizes.max(axis=0))[:3]:
        axes.plot(x, sizes[:, channel], color=_ORANGE, linewidth=1, label="3 largest channels")
    ticker = optional("matplotlib.ticker")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _draw_groups(axes: Any, timesteps: Array, boundaries: Sequence[float], descending: bool) -> None:
    for i, boundary in enumerate(boundaries):
        axes.axvline(boundary, color=_RED, linestyle="--", linewidth=1, label="_" if i else "group boundary")
    if not boundaries:
        return
    edges = [float(timesteps.min()), *boundaries, float(timesteps.max())]
    centres = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    for i, centre in enumerate(reversed(centres) if descending else centres):
        place = (centre, 1.02)
        axes.annotate(str(i + 1), place, xycoords=("data", "axes fraction"), fontsize=7, color=_RED, ha="center")
