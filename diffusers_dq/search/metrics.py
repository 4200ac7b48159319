# SPDX-License-Identifier: Apache-2.0
"""Which metric a layer's rounding shows in, by the kind of layer (ViDiT-Q, Zhao et al., ICLR 2025, section 4.3).

Cross attention shows in how a picture follows its text, spatial attention and feed-forward layers in its looks,
temporal attention in how frames follow each other. The paper measures these on finished videos; by default here it is
their shadows in the transformer's output, which need neither a decoder nor another network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor

OutputMetric = Callable[[Tensor, Tensor], float]
PipelineMetric = Callable[[Any], float]


@dataclass(frozen=True)
class LayerMetric:
    """A metric and the layers that are ranked by it.

    layers: globs over module names; of several metrics the first that matches a layer counts.
    metric: lower is better. With on="output", `metric(reference, quantized)` of two outputs of the transformer for the
        same sampled input, [B, C, ...]; with on="pipeline", `metric(pipe)` of a pipeline, run as it likes (a CLIP
        score times -1, say), of which the value in full precision is subtracted.
    """

    name: str
    layers: tuple[str, ...]
    metric: Callable[..., float]
    on: Literal["output", "pipeline"] = "output"

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or not self.layers:
            raise ValueError(f"layers of metric {self.name!r} must be a tuple of globs, got {self.layers!r}")
        if self.on not in ("output", "pipeline"):
            raise ValueError(f"metric {self.name!r}: on must be 'output' or 'pipeline', got {self.on!r}")

    def concerns(self, layer: str) -> bool:
        return any(fnmatchcase(layer, glob) for glob in self.layers)


def output_error(reference: Tensor, quantized: Tensor) -> float:
    """Mean squared difference: visual quality."""
    return float((quantized.double() - reference.double()).square().mean())


def guidance_error(reference: Tensor, quantized: Tensor) -> float:
    """Mean squared difference of the direction of guidance, conditional minus unconditional: text alignment.

    The two halves of the batch, in whichever order. Raises ValueError for an odd batch.
    """
    if len(reference) % 2:
        raise ValueError(
            f"guidance_error needs conditional and unconditional inputs as the halves of a batch, got a batch of"
            f" {len(reference)}; calibrate with guidance, or use another metric for pipelines that run the two apart"
        )
    a, b = (x.double().chunk(2) for x in (reference, quantized))
    return float(((b[0] - b[1]) - (a[0] - a[1])).square().mean())


def frame_difference_error(reference: Tensor, quantized: Tensor) -> float:
    """Mean squared difference of the steps from frame to frame: temporal consistency.

    Videos [B, C, F, H, W]. Raises ValueError for other shapes, or a single frame.
    """
    if reference.ndim != 5 or reference.shape[2] < 2:
        raise ValueError(f"frame_difference_error needs videos [B, C, F, H, W], got {list(reference.shape)}")
    a, b = (x.double().diff(dim=2) for x in (reference, quantized))
    return float((b - a).square().mean())


def default_metrics(layers: Sequence[str], *, videos: bool, guided: bool) -> tuple[LayerMetric, ...]:
    """The paper's three groups as far as a model has such layers, told by the names diffusers gives them.

    layers: names of the linears that are to be ranked.   videos: whether the output has frames.
    guided: whether conditional and unconditional inputs are the halves of a batch.
    """
    metrics = []
    if videos:
        metrics.append(LayerMetric("temporal consistency", ("*temporal*", "*attn_temp*"), frame_difference_error))
    if guided:
        metrics.append(LayerMetric("text alignment", ("*attn2*", "*cross_attn*"), guidance_error))
    present = [metric for metric in metrics if any(metric.concerns(layer) for layer in layers)]
    return (*present, LayerMetric("visual quality", ("*",), output_error))


def metric_of(layer: str, metrics: Sequence[LayerMetric]) -> LayerMetric:
    """Raises ValueError where none concerns the layer."""
    found = next((metric for metric in metrics if metric.concerns(layer)), None)
    if found is None:
        globs = [glob for metric in metrics for glob in metric.layers]
        raise ValueError(f"no metric is for {layer}: the globs are {globs}; add one with layers=('*',) for the rest")
    return found
