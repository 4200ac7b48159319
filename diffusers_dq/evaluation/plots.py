# SPDX-License-Identifier: Apache-2.0
"""Pictures of pictures, of errors by layer and step, of activations over the steps, and of quality against size.

All have a transparent ground and one grey ink, whose contrast is 4.5 to white and 4.7 to black: one file is readable on
a light page and on a dark one.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from diffusers_dq.evaluation.metrics import Array, Pictures, optional
from diffusers_dq.installation import BOUNDARIES
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.statistics import SiteStatistics, Statistics

INK = (118, 118, 118)
_INK_NAME = "#767676"
_CLEAR = (255, 255, 255, 0)  # white, for a reader that drops the transparency
_TILE = 128  # pixels that the longer side of a small picture is brought to
_GAP = 6
_MARGIN = 12


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
    matplotlib, figures = optional("matplotlib"), optional("matplotlib.figure")
    table = np.ma.masked_invalid(np.stack(list(layer_snr.values())))  # [linears, S]
    names = _short_names(list(layer_snr))
    height = float(np.clip(1.4 + 0.17 * len(names), 3, 14))
    figure = figures.Figure(figsize=(9, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    colormap = matplotlib.colormaps["magma"].with_extremes(bad="0.8")
    low, high = _color_range(table)
    image = axes.pcolormesh(table, cmap=colormap, vmin=low, vmax=high)
    figure.colorbar(image, ax=axes, label="SNR of the output, dB (dark: worse)", extend="both", pad=0.02)

    every = -(-len(names) // 70)
    axes.set_yticks(np.arange(0, len(names), every) + 0.5, names[::every], fontsize=7)
    every = -(-len(timesteps) // 20)
    axes.set_xticks(np.arange(0, len(timesteps), every) + 0.5, [f"{t:g}" for t in timesteps[::every]], fontsize=8)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_xlabel("timestep, from noise to picture")
    axes.set_title("Error of the quantized linears on the full-precision trajectory", fontsize=10)
    return figure


def _color_range(table: Any) -> tuple[float, float]:
    """From the 1st to the 99th percentile: one outlier does not blind the rest."""
    values = table.compressed()
    return tuple(np.percentile(values, (1, 99))) if len(values) else (0.0, 1.0)


def _short_names(names: Sequence[str]) -> list[str]:
    """Without the dotted parts that all begin with."""
    common = os.path.commonprefix(list(names)).rpartition(".")
    return [name.removeprefix(common[0] + common[1]) for name in names]
