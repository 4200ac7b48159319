# SPDX-License-Identifier: Apache-2.0
"""How much worse a model gets when one linear alone is quantized: a number for each linear and each choice.

From statistics alone it is the error of the linear's own output, which says nothing of what becomes of it downstream.
By running the model it is any metric of the model's output, or of finished pictures.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_dq.costs import Choice
from diffusers_dq.model_inputs import moved
from diffusers_dq.search.metrics import LayerMetric, default_metrics, metric_of, output_error
from diffusers_dq.search.record import Record
from diffusers_dq.search.running import with_transformer
from diffusers_dq.search.trial import Trial
from diffusers_dq.statistics import Statistics

Choices = Mapping[str, Sequence[Choice]]
Table = dict[str, list[float]]  # layer -> error of each of its choices


@dataclass(frozen=True)
class Sensitivity:
    """output: layer -> the model's mean squared output error with each of its choices.
    own: the same by the metric of the layer's group.   groups: layer -> name of that metric."""

    output: Mapping[str, list[float]]
    own: Mapping[str, list[float]]
    groups: Mapping[str, str]


def from_statistics(
    trial: Trial, choices: Choices, statistics: Statistics, record: Record | None = None, progress: bool = False
) -> Table:
    """Relative squared error of each linear's own output on sampled tokens; see Trial.output_error. No model run."""
    record = record or Record(None, {})
    table: Table = {}
    with tqdm(total=_count(choices), desc="sensitivity", unit="choice", disable=not progress) as bar:
        for name, some in choices.items():
            table[name] = []
            for choice in some:
                error = functools.partial(trial.output_error, name, choice, statistics)
                table[name].append(record.value(f"{name} {choice}", error))
                bar.update(1)
    return table


def from_outputs(
    trial: Trial,
    choices: Choices,
    statistics: Statistics,
    metrics: Sequence[LayerMetric] | None = None,
    *,
    pipe: DiffusionPipeline | None = None,
    record: Record | None = None,
    progress: bool = False,
    component: str | None = None,
) -> Sensitivity:
    """Run the transformer on sampled inputs with one linear quantized at a time.

    statistics: with samples, the keyword arguments of forwards.
    metrics: None is `default_metrics`.   pipe: for metrics of finished pictures; the trial's model is its `component`.
    record: where values are kept.
    Forwards: choices times samples, and a run of the pipeline a choice for layers with a metric of pictures.
    Memory: the model's output for each sample.
    Raises ValueError without samples, for a layer that no metric concerns, a metric of pictures without a pipeline.
    """
    if not statistics.samples:
        raise ValueError("the statistics hold no samples of the model's input: calibrate with samples=32")
    record = record or Record(None, {})
    device, dtypes = next(trial.model.parameters()).device, statistics.dtypes_for(trial.model)
    samples = [moved(sample, device, dtypes) for sample in statistics.samples]
    references = [_output(trial.model, sample) for sample in samples]
    if metrics is None:
        metrics = default_metrics(
            list(choices), videos=references[0].ndim == 5, guided=all(len(output) % 2 == 0 for output in references)
        )
    of_layer = {name: metric_of(name, metrics) for name in choices}
    measure = _Measure(trial, samples, references, pipe, record, component)
    measure.check(of_layer.values())
    output: Table = {}
    own: Table = {}
    with tqdm(total=_count(choices), desc="sensitivity", unit="choice", disable=not progress) as bar:
        for name, some in choices.items():
            output[name], own[name] = [], []
            for choice in some:
                general, particular = measure(name, choice, of_layer[name])
                output[name].append(general)
                own[name].append(particular)
                bar.update(1)
    return Sensitivity(output, own, {name: metric.name for name, metric in of_layer.items()})


class _Measure:
    def __init__(
        self,
        trial: Trial,
        samples: Sequence[Mapping[str, Any]],
        references: Sequence[Tensor],
        pipe: DiffusionPipeline | None,
        record: Record,
        component: str | None,
    ) -> None:
        self.trial, self.samples, self.references, self.record = trial, samples, references, record
        self.pipe = None if pipe is None else with_transformer(pipe, trial.model, component)

    def check(self, metrics: Any) -> None:
        for metric in metrics:
            if metric.on == "pipeline" and self.pipe is None:
                raise ValueError(
                    f"metric {metric.name!r} is of pictures and needs the pipeline; give the pipeline, not its"
                    " transformer alone"
                )

    def __call__(self, name: str, choice: Choice, metric: LayerMetric) -> tuple[float, float]:
        """(output error, the metric's) with this linear alone quantized."""
        keys = f"{name} {choice} output", f"{name} {choice} metric {metric.name}"
        if any(key not in self.record.values for key in keys):
            base = self._in_full_precision(metric) if metric.on == "pipeline" else 0.0
            with self.trial.using({name: choice}) as model:
                general, particular = self._measured(model, metric, base)
            self.record.value(keys[0], lambda: general)
            self.record.value(keys[1], lambda: particular)
        return self.record.values[keys[0]], self.record.values[keys[1]]

    def _in_full_precision(self, metric: LayerMetric) -> float:
        return self.record.value(f"full precision {metric.name}", lambda: metric.metric(self.pipe))

    def _measured(self, model: nn.Module, metric: LayerMetric, base: float) -> tuple[float, float]:
        general = particular = 0.0
        for sample, reference in zip(self.samples, self.references, strict=True):
            output = _output(model, sample)
            general += output_error(reference, output) / len(self.samples)
            if metric.on == "output":
                particular += metric.metric(reference, output) / len(self.samples)
        if metric.on == "pipeline":
            particular = metric.metric(self.pipe) - base
        return general, particular


def _count(choices: Choices) -> int:
    return sum(map(len, choices.values()))


@torch.no_grad()
def _output(model: nn.Module, sample: Mapping[str, Any]) -> Tensor:
    """What the transformer makes of a sampled input, on the CPU; a list of samples' outputs as one batch."""
    output = model(**{**sample, "return_dict": False})[0]
    return (torch.stack(output) if isinstance(output, list) else output).cpu()
