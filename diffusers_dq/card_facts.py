# SPDX-License-Identifier: Apache-2.0
"""The facts of a model card: what a quantized model is made of, how it was calibrated and compared, on what machine.

`part_of`, `calibration_of`, `comparison_of` and `machine` return what is JSON-able, so that a card renders the same
where the model is not. Nothing here knows how a card looks.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from diffusers_dq.config import DQConfig
from diffusers_dq.denoise import DENOISERS, denoiser
from diffusers_dq.evaluation import Comparison
from diffusers_dq.hardware import name_of, version_of
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.quantizer import DQQuantizer
from diffusers_dq.report import LinearReport, inspect, op_of
from diffusers_dq.statistics import Statistics
from diffusers_dq.usage import literal

_VERSIONS = ("diffusers-dq", "diffusers", "torch", "transformers", "triton")
_RECORD = ("quant_method", "format_version", "result", "statistics", "runtime")  # of a config, that is no setting


def check_publishable(pipe_or_transformer: Any) -> dict[str, ModelMixin]:
    """The quantized transformers by name ("transformer" for one alone).

    Raises ValueError with the reason where there is nothing to publish: a model that is not quantized, or only
    prepared, or that carries an adapter, which would not be saved.
    """
    if not isinstance(pipe_or_transformer, DiffusionPipeline):
        there = {"transformer": denoiser(pipe_or_transformer)}
        carriers: Iterable[tuple[str, Any]] = there.items()
    else:
        names = [name for name in DENOISERS if getattr(pipe_or_transformer, name, None) is not None]
        there = {name: denoiser(pipe_or_transformer, name) for name in names or DENOISERS[:1]}
        carriers = pipe_or_transformer.components.items()
    for name, model in there.items():
        quantizer = getattr(model, "hf_quantizer", None)
        if isinstance(quantizer, DQQuantizer) and quantizer.prepared:
            raise ValueError(
                f"{name} is prepared for {quantizer.quantization_config.method!r} but not quantized: run"
                " dq.calibrate(pipe, ...) and dq.quantize(pipe) before publishing it"
            )
    for name, part in carriers:
        adapted = _adapted(part)
        if adapted:
            raise ValueError(
                f"an adapter is loaded on {name} ({adapted}), and a quantized model is published without: save the"
                " adapter for a repository of its own (save_lora_weights), unload it (unload_lora_weights,"
                " unload_lora), then push the model"
            )
    done = {name: model for name, model in there.items() if _is_ours(model)}
    if not done:
        kinds = ", ".join(f"{name} is a {type(model).__name__}" for name, model in there.items())
        raise ValueError(
            f"nothing here is quantized by diffusers_dq ({kinds}): quantize it first (dq.quantize), or publish it as"
            " it is with its own push_to_hub"
        )
    return done


def _is_ours(model: Any) -> bool:
    quantizer = getattr(model, "hf_quantizer", None)
    return bool(getattr(model, "is_quantized", False)) and isinstance(quantizer, DQQuantizer)


def _adapted(part: Any) -> str:
    if not isinstance(part, nn.Module):
        return ""
    return next((name for name, _ in part.named_modules() if name.endswith(".base_layer")), "")


def part_of(name: str, model: ModelMixin, file_bytes: int | None) -> dict[str, Any]:
    """Of one transformer, JSON-able.

    layers: linears of one kind, with their count and bytes.   kept: those in full precision, by reason, names with
    numbers as `*`.   notes: what is odd about quantized ones.   bytes_16: of the model at 16 bits a weight.
    """
    report = inspect(model)
    config: DQConfig = model.hf_quantizer.quantization_config
    notes = (config.result or {}).get("notes", {})
    layers: dict[tuple[str, ...], list[int]] = {}
    for row in report.linears:
        if row.bits != "full":
            layers.setdefault((row.bits, row.granularity, _op(model, row)), []).append(row.nbytes)
    bits = Counter(row.bits for row in report.quantized if row.bits.startswith("W"))
    return {
        "name": name,
        "class": type(model).__name__,
        "method": config.method,
        "bits": [kind for kind, _ in bits.most_common()],
        "config": recipe_source(config),
        "groups": max((row.groups for row in report.linears), default=0),
        "quantized": sum(bits.values()),
        "linears": sum(bits.values()) + len(report.kept),
        "layers": [
            {"bits": kind[0], "activation": kind[1], "op": kind[2], "count": len(sizes), "bytes": sum(sizes)}
            for kind, sizes in sorted(layers.items(), key=lambda item: -sum(item[1]))
        ],
        "kept": _by_reason(report.kept),
        "kept_bytes": sum(row.nbytes for row in report.linears if row.bits == "full"),
        "notes": _by_reason({row.name: notes[row.name] for row in report.quantized if row.name in notes}),
        "file_bytes": file_bytes,
        "bytes_16": 2 * _weights(model),
    }


def _op(model: nn.Module, row: LinearReport) -> str:
    module = model.get_submodule(row.name)
    if isinstance(module, QuantizedLinear):
        return op_of(module.layout) or "floating point"
    return "attention_int8" if row.bits.startswith("A") else "element-wise"


def _weights(model: nn.Module) -> int:
    """How many there were before, of the parameters that a file holds; what is shared counts once."""
    count, seen = 0, set()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            count += int(module.out_features) * (int(module.in_features) + 1)
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                count += parameter.numel()
    return count


def _by_reason(reasons: Mapping[str, str]) -> list[dict[str, Any]]:
    """[{"reason", "count", "names"}]; names with their numbers as `*`, each once."""
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name)
    return [
        {
            "reason": reason,
            "count": len(names),
            "names": list(dict.fromkeys(re.sub(r"\b\d+\b", "*", n) for n in names)),
        }
        for reason, names in grouped.items()
    ]


def recipe_source(config: DQConfig) -> str:
    """Python that makes the configuration again, with what differs from the defaults."""
    given = {key: value for key, value in config.to_dict().items() if key not in _RECORD}
    defaults = DQConfig(config.method, result={}).to_dict()
    always = ("weight_bits", "activation_bits")
    changed = {k: v for k, v in given.items() if k != "method" and (k in always or v != defaults.get(k))}
    arguments = ", ".join(f"{key}={literal(value)}" for key, value in changed.items())
    return f"dq.DQConfig({config.method!r}, {arguments})"


def calibration_of(statistics: Statistics) -> dict[str, Any]:
    """Without the values of arguments: prompts may be private."""
    about = statistics.about
    arguments = dict.fromkeys(name for call in about.get("arguments", ()) for name in call)
    return {
        "model": about.get("model_class"),
        "pipeline": about.get("pipeline_class"),
        "scheduler": _scheduler(about.get("scheduler")),
        "steps": about.get("num_inference_steps"),
        "calls": about.get("calls_done"),
        "arguments": list(arguments),
        "seed": about.get("seed"),
        "dtype": str(about.get("dtype", "")).removeprefix("torch."),
        "timesteps": [float(statistics.timesteps[0]), float(statistics.timesteps[-1])],
    }


def _scheduler(described: Any) -> str:
    """Its class; calibration notes its settings beside."""
    found = re.match(r"\w+", str(described))
    return found.group() if found else "unknown"


def comparison_of(comparison: Comparison) -> dict[str, Any]:
    """dB as text: of equal pictures there is no number."""
    return {
        "pictures": len(comparison.psnr),
        "steps": len(comparison.timesteps),
        "psnr": _decibels(comparison.mean_psnr),
        "psnr_worst": _decibels(float(comparison.psnr.min())),
        "ssim": f"{comparison.mean_ssim:.4f}",
        "ssim_worst": f"{float(comparison.ssim.min()):.4f}",
        "latent_snr": _decibels(float(comparison.latent_snr[-1])),
        "layers": [[name, _decibels(snr)] for name, snr in comparison.worst_layers(5)],
    }


def _decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "equal" if value > 0 else "not a number"


def library_of(shown: type) -> str:
    """The module that has the class."""
    if getattr(diffusers, shown.__name__, None) is shown:
        return "diffusers"
    return "diffusers_dq.opensora" if shown.__module__.startswith("diffusers_dq.opensora") else shown.__module__


def machine(device: torch.device) -> dict[str, Any]:
    """{"hardware": the name of what `device` is, "versions": of the packages that are installed}."""
    versions = {name: found for name in _VERSIONS if (found := version_of(name)) is not None}
    return {"hardware": name_of(device), "versions": versions}
