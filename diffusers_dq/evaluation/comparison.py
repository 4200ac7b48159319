# SPDX-License-Identifier: Apache-2.0
"""What `dq.compare` found, and the files it is kept in."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from diffusers_dq.evaluation.metrics import Array
from diffusers_dq.evaluation.plots import activation_ranges, image_grid, layer_heatmap, save_figure
from diffusers_dq.files import write_json, write_whole
from diffusers_dq.statistics import Statistics

_MOST_COLUMNS = 8  # of the saved grid


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """A full-precision and a quantized pipeline on the same calls and seeds. n pictures, S denoising steps.

    images_reference, images_quantized: [n, H, W, C] in [0, 1]; of a video, its first frame.
    psnr: [n] dB, inf for equal pictures.   ssim: [n], 1 for equal pictures.
    timesteps: [S], as the transformer gets them, in the order of the run.
    latent_snr: [S] dB, of the transformer's first input along both trajectories. The first is inf: the same noise.
    layer_snr: quantized linear -> [S] dB, of its output when both transformers get the inputs of the reference
        trajectory: what rounding does up to and including this linear within one step, nothing carried over from
        earlier steps. inf where nothing differs, NaN at a step that did not reach the linear.
    left_out: quantized linear without an SNR -> the reason.
    """

    images_reference: Array
    images_quantized: Array
    psnr: Array
    ssim: Array
    timesteps: Array
    latent_snr: Array
    layer_snr: Mapping[str, Array]
    left_out: Mapping[str, str]

    @property
    def mean_psnr(self) -> float:
        """Mean over pictures, in dB; inf as soon as one pair of pictures is equal."""
        return float(self.psnr.mean())

    @property
    def mean_ssim(self) -> float:
        return float(self.ssim.mean())

    def worst_layers(self, n: int = 10) -> list[tuple[str, float]]:
        """The n linears of lowest mean SNR over the steps that reach them, in dB, the lowest first."""
        means = [(name, float(snr[~np.isnan(snr)].mean())) for name, snr in self.layer_snr.items()]
        return sorted(means, key=lambda pair: pair[1])[:n]

    def to_dict(self) -> dict[str, Any]:
        """All but the pictures, for strict JSON: numbers that are not finite become "inf", "-inf" or "nan", which
        `float` reads back."""
        return {
            "mean_psnr": _number(self.mean_psnr),
            "mean_ssim": _number(self.mean_ssim),
            "psnr": _numbers(self.psnr),
            "ssim": _numbers(self.ssim),
            "timesteps": _numbers(self.timesteps),
            "latent_snr": _numbers(self.latent_snr),
            "layer_snr": {name: _numbers(snr) for name, snr in self.layer_snr.items()},
            "left_out": dict(self.left_out),
        }

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        statistics: Statistics | None = None,
        model: nn.Module | None = None,
    ) -> list[Path]:
        """Write comparison.json (`to_dict`), grid.png (up to 8 pictures: reference, quantized, difference), where
        layers were compared layer_snr.png, and where there are statistics activation_ranges.png. Makes the folder;
        overwrites these files, and returns them.

        statistics: of the model's calibration.   model: the quantized transformer, whose timestep groups are drawn.
        The pictures have a transparent ground and can be read on white and on black.

        Raises ImportError without matplotlib, before anything is written.
        """
        heatmap = layer_heatmap(self.layer_snr, self.timesteps) if self.layer_snr else None
        ranges = activation_ranges(statistics, model) if statistics is not None else None
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "comparison.json", folder / "grid.png"]
        write_json(written[0], self.to_dict())
        grid = self.grid()
        write_whole(written[1], lambda file: grid.save(file, format="png"))
        for name, figure in (("layer_snr.png", heatmap), ("activation_ranges.png", ranges)):
            if figure is not None:
                written.append(folder / name)
                save_figure(figure, written[-1])
        return written

    def grid(self) -> Any:
        """The first 8 pictures as a PIL image: reference, quantized, their difference amplified, PSNR and SSIM."""
        reference, quantized = self.images_reference[:_MOST_COLUMNS], self.images_quantized[:_MOST_COLUMNS]
        difference = np.abs(reference - quantized)
        gain = _gain(difference)
        scores = zip(self.psnr[:_MOST_COLUMNS], self.ssim[:_MOST_COLUMNS], strict=True)
        return image_grid(
            {"full precision": reference, "quantized": quantized, f"difference x {gain}": difference * gain},
            captions=[f"{psnr:.1f} dB\nSSIM {ssim:.3f}" for psnr, ssim in scores],
        )


def _gain(difference: Array) -> int:
    """The largest power of two, 64 at most, that leaves 99 percent of the differences below 1."""
    high = float(np.nanquantile(difference, 0.99)) if np.isfinite(difference).any() else 1.0
    return 1 << int(np.clip(math.log2(1 / max(high, 1e-9)), 0, 6))


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _numbers(values: Array) -> list[float | str]:
    return [_number(float(value)) for value in values]
