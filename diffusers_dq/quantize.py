# SPDX-License-Identifier: Apache-2.0
"""`dq.quantize`: a pipeline's transformer, in place."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin

from diffusers_dq.calibration import calibrate
from diffusers_dq.config import DQConfig
from diffusers_dq.conversion import convert
from diffusers_dq.denoise import Call, denoiser
from diffusers_dq.quantizer import DQQuantizer
from diffusers_dq.report import QuantizationReport, inspect
from diffusers_dq.snapshot import Snapshot
from diffusers_dq.statistics import Statistics


def quantize(
    pipe_or_transformer: Any,
    config: DQConfig | str | os.PathLike[str] | None = None,
    *,
    statistics: Statistics | str | os.PathLike[str] | None = None,
    calls: Sequence[Call] | None = None,
    num_inference_steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    component: str | None = None,
) -> QuantizationReport:
    """Quantize the transformer of a pipeline, or a transformer, in place; report what each linear became.

    config: or the path of its JSON file (`config.to_json_file`), as searches save what they find. May be left out for
        a model that was loaded *prepared*, which brings its own.
    statistics: from `dq.calibrate`, or their path or repository on the Hub; else the config's, else what
        `dq.calibrate` left on a prepared model. With `calls` and `num_inference_steps` (as `dq.calibrate` takes them)
        it calibrates first.

    checkpoint: of rounding="adaround", written after each unit: the same call again resumes there.
    component: "transformer" or "transformer_2" of a pipeline that has both (Wan 2.2), of which one is quantized.

    It finishes or leaves the model as it was, also after Ctrl-C. Raises ValueError where the method needs statistics
    and has none, or they are of another model; where the model is quantized already; where a skip string or override
    matches no linear.
    """
    model = denoiser(pipe_or_transformer, component)
    if isinstance(config, str | os.PathLike):
        config = DQConfig.from_json_file(config)
    if not isinstance(config, DQConfig | None):
        raise ValueError(f"config must be a dq.DQConfig or the path of its JSON file, got {config!r}")
    if not isinstance(statistics, Statistics | str | os.PathLike | None):
        raise ValueError(f"statistics must be what dq.calibrate returned or the path of its file, got {statistics!r}")
    if statistics is not None and calls is not None:
        raise ValueError("quantize takes statistics, or calls to calibrate with, not both")
    if getattr(model, "is_quantized", False):
        raise ValueError(f"the {type(model).__name__} is quantized already; load it in full precision to do it again")
    quantizer = getattr(model, "hf_quantizer", None)
    prepared = quantizer if isinstance(quantizer, DQQuantizer) else None
    config = config or (prepared.quantization_config if prepared else None)
    if config is None:
        raise ValueError("quantize needs a config: dq.DQConfig(method=...); only a prepared model brings one")
    if config.result is not None:
        config = config.copy(result=None)  # taken from a quantized model: do the same again
    if calls is not None:
        statistics = _calibrate_first(pipe_or_transformer, calls, num_inference_steps, seed, progress, component)
    statistics = statistics if statistics is not None else config.statistics
    if statistics is None and prepared is not None:
        statistics = prepared.statistics
    if isinstance(statistics, (str, os.PathLike)):
        statistics = Statistics.load(statistics)
    _convert(model, config, statistics, prepared, progress, checkpoint)
    return inspect(model)


def _convert(
    model: ModelMixin,
    config: DQConfig,
    statistics: Statistics | None,
    prepared: DQQuantizer | None,
    progress: bool,
    checkpoint: str | os.PathLike[str] | None,
) -> None:
    """All of it or, whatever is raised on whichever line, nothing."""
    before = Snapshot(model, *([prepared] if prepared else ()))
    try:
        with torch.no_grad():
            done = convert(model, config, statistics, dtype=model.dtype, progress=progress, checkpoint=checkpoint)
        (prepared or DQQuantizer(done)).adopt(model, done)
    except BaseException:
        before.restore()
        raise


def _calibrate_first(
    pipe: Any,
    calls: Sequence[Call],
    num_inference_steps: int | None,
    seed: int,
    progress: bool,
    component: str | None,
) -> Statistics:
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError("calls are calls of a pipeline; give quantize the pipeline, not its transformer alone")
    if num_inference_steps is None:
        raise ValueError("calls need num_inference_steps, the denoising steps of each call")
    return calibrate(
        pipe, calls, num_inference_steps=num_inference_steps, seed=seed, progress=progress, component=component
    )
