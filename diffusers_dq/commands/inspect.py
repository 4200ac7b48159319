# SPDX-License-Identifier: Apache-2.0
"""`diffusers-dq inspect ...`"""

from dataclasses import asdict
from pathlib import Path

import diffusers_dq as dq
from diffusers_dq.commands.console import device_of, emit
from diffusers_dq.commands.options import Component, Device, Dtype, Json, Model
from diffusers_dq.evaluation.loading import load_pipeline


def inspect(
    model: Model, component: Component = None, device: Device = "cpu", dtype: Dtype = "float32", json: Json = False
) -> None:
    """What each linear of a model is: bits, bytes, kernel, and why.

    The kernel is the one that would run on --device; a folder may also hold a transformer alone.
    """
    if device == "cpu" and Path(model).is_dir():
        if not any((Path(model) / name).is_file() for name in ("model_index.json", "config.json")):
            raise ValueError(f"{model} holds neither a pipeline (model_index.json) nor a transformer (config.json)")
        report = dq.inspect(model, component)
    else:
        report = dq.inspect(load_pipeline(model, dtype, device_of(device)), component)
    content = {
        "model": model,
        "method": report.method,
        "quantized": len(report.quantized),
        "kept": report.kept,
        "bytes": report.nbytes,
        "linears": [asdict(row) for row in report.linears],
    }
    emit(content, str(report), as_json=json)
