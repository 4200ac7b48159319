# SPDX-License-Identifier: Apache-2.0
"""PTQD (He et al., NeurIPS 2023; arXiv 2305.10657): what rounding adds to a prediction, taken out again.

The error of a quantized model's prediction is split into a part that follows the prediction itself and the rest,

    eps_q = (1 + k_t) eps + r_t,   corrected   (eps_q - E[r_t]) / (1 + k_t)   (Eq. 8 to 12)

with k_t a number a step and E[r_t] one a channel, both fitted on the inputs that calibration kept. The variance of r_t
is kept for samplers that add noise of their own: `PTQDScheduler` adds less by as much.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor, nn

from diffusers_dq.denoise import TimestepArgument
from diffusers_dq.replay import prediction

NAME = "noise_correction"

# A pipeline looks for the base class in the module of a scheduler that is not diffusers' own, to load it again.
__all__ = ["NAME", "CorrectOutput", "NoiseCorrection", "PTQDScheduler", "SchedulerMixin", "fit"]


class NoiseCorrection(nn.Module):
    """Buffers fp32: timesteps [S] ascending, slope k [S], mean and variance [S, C] of r in each channel.

    Channels beyond C, a learned variance, are left alone. Between fitted steps the nearest one counts.
    """

    timesteps: Tensor
    slope: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, steps: int, channels: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("timesteps", torch.zeros(steps, device=device))
        self.register_buffer("slope", torch.zeros(steps, device=device))
        self.register_buffer("mean", torch.zeros(steps, channels, device=device))
        self.register_buffer("variance", torch.zeros(steps, channels, device=device))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample: [n, C or more, ...], or [n, tokens, C].   timestep: [n], one for all, or [n, tokens], of which the
        largest counts, as in `fit`."""
        timestep = timestep.reshape(len(timestep) if timestep.ndim else 1, -1).amax(1, keepdim=True)
        step = (self.timesteps - timestep.to(self.timesteps)).abs().argmin(1)  # [n]
        channels = self.mean.shape[1]
        axis = _channel_axis(sample, channels)
        noise = sample.narrow(axis, 0, channels)
        shape = [-1] + [1] * (sample.ndim - 1)
        mean_shape = list(shape)
        mean_shape[axis] = channels
        corrected = (noise - self.mean[step].view(mean_shape)) / (1 + self.slope[step].view(shape))
        rest = sample.narrow(axis, channels, sample.shape[axis] - channels)
        return torch.cat([corrected.to(sample.dtype), rest], dim=axis)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Follows moves of the model, not its casts."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            setattr(self, name, buffer.to(fn(torch.empty(0, device=buffer.device)).device))
        return self


def _channel_axis(sample: Tensor, channels: int) -> int:
    """The axis of as many channels, or twice as many with a learned variance: of tokens [n, tokens, C] the last, of
    pictures and most videos the second, of some videos [n, frames, C, H, W] the third.

    Raises ValueError where no axis fits.
    """
    likely = (2, 1) if sample.ndim == 3 else (1, 2)
    axis = next((axis for axis in likely if sample.shape[axis] in (channels, 2 * channels)), None)
    if axis is None:
        raise ValueError(
            f"noise correction needs a prediction with {channels} channels, or twice as many, second or third; got"
            f" {tuple(sample.shape)}"
        )
    return axis


def channels_of(sample: Tensor, likely: Sequence[int]) -> int:
    """The first of these numbers of channels that a prediction has, or has twice; else the first, which `fit` refuses.
    A model that packs latents into tokens predicts as many as it takes in, whatever its config calls its outputs."""
    axes = (2, 1) if sample.ndim == 3 else (1, 2)
    there = [sample.shape[axis] for axis in axes if axis < sample.ndim]
    return next((channels for channels in likely if {channels, 2 * channels} & set(there)), likely[0])


def fit(pairs: Iterable[tuple[Tensor, Tensor, Tensor]], in_channels: int) -> NoiseCorrection:
    """pairs: timesteps [n], prediction in full precision, and of the quantized model, of the same inputs.

    Steps are fitted one by one, in fp64. Raises ValueError without pairs.
    """
    errors: dict[float, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for timestep, exact, quantized in pairs:
        axis = _channel_axis(exact, in_channels)
        channels = min(in_channels, exact.shape[axis])
        both = (x.narrow(axis, 0, channels).movedim(axis, 0).flatten(1).double() for x in (exact, quantized))
        errors[float(timestep.max())].append(tuple(both))  # type: ignore[arg-type]
    if not errors:
        raise ValueError("noise correction is fitted on kept inputs, and there are none: calibrate with samples=32")
    fitted = [_fit_step(*(torch.cat(parts, 1) for parts in zip(*errors[t], strict=True))) for t in sorted(errors)]
    correction = NoiseCorrection(len(fitted), len(fitted[0][1]))
    correction.timesteps.copy_(torch.tensor(sorted(errors)))
    for i, (slope, mean, variance) in enumerate(fitted):
        correction.slope[i], correction.mean[i], correction.variance[i] = slope, mean, variance
    return correction


def _fit_step(exact: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(k, mean [C], variance [C]) of quantized = (1 + k) exact + r, [C, values] each, by least squares over all.

    Each channel about its own mean: channels that differ in E[r] as they do in E[exact] are no slope.
    """
    error = quantized - exact
    centred = exact - exact.mean(1, keepdim=True)
    error_centred = error - error.mean(1, keepdim=True)
    slope = (centred * error_centred).sum() / centred.square().sum().clamp(min=torch.finfo(exact.dtype).tiny)
    rest = error - slope * exact
    return slope, rest.mean(1), rest.var(1, correction=0)


class CorrectOutput:
    """Forward hook of the model."""

    def __init__(self, argument: TimestepArgument) -> None:
        self.argument = argument

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        sample = prediction(output)
        timestep = torch.as_tensor(self.argument.read(args, kwargs), device=sample.device)
        corrected = getattr(model, NAME)(sample, timestep)
        if isinstance(output, tuple) and not hasattr(output, "sample"):
            return (corrected, *output[1:])
        output.sample = corrected
        return output


class PTQDScheduler(DDPMScheduler):
    """DDPM whose own noise makes room for the quantization noise that predictions bring along (PTQD, Eq. 15).

    sigma'^2 = max(0, sigma^2 - (beta_t^2 / (alpha_t (1 - alpha-bar_t))) Var[r_t] / (1 + k_t)^2), with the variance
    averaged over channels. Guidance, which mixes two predictions, is not accounted for. A scheduler loaded from a file
    follows nothing until it is told to.
    """

    def follow(self, transformer: nn.Module) -> "PTQDScheduler":
        """Take the variances of a transformer quantized with noise correction. Raises ValueError for another."""
        correction = getattr(transformer, NAME, None)
        if not isinstance(correction, NoiseCorrection):
            raise ValueError(f'{type(transformer).__name__} has no noise correction: quantize it with method="ptqd"')
        if self.config.prediction_type != "epsilon":
            raise ValueError(
                f"prediction_type is {self.config.prediction_type!r}; the variance is known of a predicted noise,"
                " 'epsilon'"
            )
        self._timesteps = correction.timesteps.cpu()
        self._variance = (correction.variance.mean(1) / (1 + correction.slope).square()).cpu()
        return self

    def _get_variance(self, t: int, predicted_variance: Any = None, variance_type: str | None = None) -> Tensor:
        variance = super()._get_variance(t, predicted_variance, variance_type)
        if not hasattr(self, "_variance"):
            return variance
        kind = variance_type or self.config.variance_type
        if kind not in ("fixed_small", "fixed_large"):
            raise ValueError(
                f"variance_type is {kind!r}; PTQDScheduler takes variance off a fixed one: set it to 'fixed_small' or"
                " 'fixed_large'"
            )
        previous = self.previous_timestep(t)
        product, before = self.alphas_cumprod[t], self.alphas_cumprod[previous] if previous >= 0 else self.one
        alpha = product / before
        of_step = self._variance[(self._timesteps - float(t)).abs().argmin()]
        taken = (1 - alpha) ** 2 / (alpha * (1 - product)) * of_step
        return torch.clamp(variance - taken, min=1e-20)
