# SPDX-License-Identifier: Apache-2.0
"""Model cards: what is known of a quantized model, collected, and rendered from card_template.md."""

import inspect as python_inspect
import math
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata as packages
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from diffusers_dq.config import DQConfig
from diffusers_dq.denoise import DENOISERS, denoiser
from diffusers_dq.evaluation import Comparison
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.quantizer import DQQuantizer
from diffusers_dq.report import LinearReport, inspect, op_of
from diffusers_dq.statistics import Statistics

TEMPLATE = "card_template.md"
GRID = "comparison/grid.png"
_VERSIONS = ("diffusers-dq", "diffusers", "torch", "transformers", "triton")
_RECORD = ("quant_method", "format_version", "result", "statistics", "runtime")  # of a config, that is no setting
_OUR_TAG = re.compile(r"diffusers_dq|w\d+a\d+|method:\w+")
_ONE_OF_EACH = ("license", "license_name", "license_link", "language", "pipeline_tag")  # that a derived model shares
_PROMPT = "a lighthouse in a storm"


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that a card says, JSON-able: `Card(**json.loads(...))` renders the same text anywhere.

    title: heading.   repo_id, subfolder: where the model is loaded from.   metadata: of the YAML block.
    pipeline: its class, "" for a transformer alone.   library: the module that has the class.
    call: keyword arguments of the example.   returns: the output's field that holds pictures, "images" or "frames".
    dtype: of what is not quantized.   parts: one dict a quantized transformer (`_part`).
    given: keys of the metadata that stand whatever an existing card says.
    calibration: of `_calibration`, by part.   comparison: of `_comparison`.   grid: path of a picture of it.
    hardware, versions: of the machine that made the card.   notes: paragraphs to end the introduction with.
    """

    title: str
    repo_id: str
    subfolder: str = ""
    metadata: Mapping[str, Any]
    given: list[str] = field(default_factory=list)
    pipeline: str
    library: str
    call: Mapping[str, Any]
    returns: str = "images"
    dtype: str
    parts: list[dict[str, Any]]
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None
    grid: str = ""
    hardware: str
    versions: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def begin(self) -> str:
        return f"<!-- diffusers_dq: begin {self.subfolder}".rstrip() + " -->"

    @property
    def end(self) -> str:
        return f"<!-- diffusers_dq: end {self.subfolder}".rstrip() + " -->"

    def render(self, existing: str | None = None) -> str:
        """The README.md. What people wrote into an existing one is kept: all text but what stands between the markers
        of this card, which is put at the end where there are none yet, and of the metadata every key that is there;
        of tags, ours are replaced.

        Raises ValueError where the metadata of the existing one cannot be read.
        """
        try:
            card = read_card("---\n{}\n---\n" if existing is None else existing)
        except ValueError as error:
            raise ValueError(
                f"the README.md in {self.repo_id}: {error}. Correct it on the Hub, or remove it, and push again"
            ) from error
        theirs = {key: value for key, value in card.data.to_dict().items() if key not in self.given}
        ours = self.metadata["tags"]
        own = [tag for tag in theirs.get("tags", []) if tag not in ours and not _OUR_TAG.fullmatch(tag)]
        merged = {**self.metadata, **theirs, "tags": [*own, *ours]}
        with as_file(files("diffusers_dq") / TEMPLATE) as template:
            variables = {**self._variables(), "metadata": merged}
            fresh = ModelCard.from_template(ModelCardData(**merged), template_path=str(template), **variables)
        if not card.text.strip():
            return fresh.content
        return f"---\n{fresh.data.to_yaml()}\n---\n{self._placed(card.text, fresh.text)}"

    def _placed(self, text: str, fresh: str) -> str:
        section = fresh[fresh.index(self.begin) : fresh.index(self.end) + len(self.end)]
        start, stop = text.find(self.begin), text.find(self.end)
        if start < 0 or stop < start:
            return f"{text.rstrip()}\n\n{section}\n"
        return text[:start] + section + text[stop + len(self.end) :]

    def _variables(self) -> dict[str, Any]:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.call.items())
        return {**self.to_dict(), "begin": self.begin, "end": self.end, "arguments": arguments, "text": _cell}


def read_card(text: str) -> ModelCard:
    """Raises ValueError where its metadata cannot be read."""
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"its metadata cannot be read ({error})") from error


def make_card(
    pipe_or_transformer: Any,
    repo_id: str,
    *,
    comparison: Comparison | None = None,
    statistics: Mapping[str, Statistics] | None = None,
    call: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
    file_bytes: Mapping[str, int] | None = None,
    subfolder: str = "",
) -> Card:
    """Of a quantized pipeline or transformer; nothing is written and no network used.

    statistics: by part ("transformer", "transformer_2"), what it was calibrated on.   call: keyword arguments of the
        example, literals; None: a prompt, or the first class.
    base: metadata of the original's card, of which licence, language and kind of pipeline are taken over; with
        "base_model" its id on the Hub.   metadata: what is to stand in the card whatever else is known.
    file_bytes: of each part's weights as saved.

    Raises ValueError for a model that is not quantized (`check_publishable`), for statistics of another model, for a
    call that cannot be written down.
    """
    parts = check_publishable(pipe_or_transformer)
    pipe = pipe_or_transformer if isinstance(pipe_or_transformer, DiffusionPipeline) else None
    shown = type(pipe) if pipe is not None else type(next(iter(parts.values())))
    tag = pipeline_tag(pipe) if pipe is not None else None
    described = [_part(name, model, (file_bytes or {}).get(name)) for name, model in parts.items()]
    for name, of_part in (statistics or {}).items():
        known = type(parts[name]).__name__ if name in parts else None
        if of_part.about.get("model_class") != known:
            raise ValueError(
                f"the statistics given for {name} are of a {of_part.about.get('model_class')}, not {known}"
            )
    model = next(iter(parts.values()))
    return Card(
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        subfolder=subfolder,
        metadata=_metadata(described, tag, base or {}, metadata or {}),
        given=[key for key in metadata or {} if key != "tags"],
        pipeline="" if pipe is None else type(pipe).__name__,
        library=_library(shown),
        call=_call(pipe, call),
        returns="frames" if (tag or "").endswith("-video") else "images",
        dtype=str(model.dtype).removeprefix("torch."),
        parts=described,
        calibration={name: _calibration(of_part) for name, of_part in (statistics or {}).items()},
        comparison=None if comparison is None else _comparison(comparison),
        grid="" if comparison is None else f"{subfolder}/{GRID}".lstrip("/"),
        hardware=_hardware(model.device),
        versions=_versions(),
    )


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


def pipeline_tag(pipe: DiffusionPipeline) -> str:
    """The Hub's name for what a pipeline does, by its class: what it takes, and whether it makes frames."""
    takes = python_inspect.signature(type(pipe).__call__).parameters
    name = type(pipe).__name__
    kind = "video" if {"num_frames", "video_length"} & takes.keys() else "image"
    if re.search(r"VideoToVideo|Video2Video", name):
        return "video-to-video"
    if re.search(r"ImageToVideo|Image2Video", name):
        return "image-to-video"
    if re.search(r"Img2Img|ImageToImage|Inpaint|Edit|Kontext|Fill|Upscale", name):
        return "image-to-image"
    return f"text-to-{kind}" if "prompt" in takes else f"unconditional-{kind}-generation"


def _metadata(
    parts: list[dict[str, Any]], tag: str | None, base: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    taken = {key: base[key] for key in _ONE_OF_EACH if base.get(key) is not None}
    base_model = given.get("base_model", base.get("base_model"))
    methods = [f"method:{part['method']}" for part in parts]
    tags = ["diffusers_dq", "quantized", *methods, *(bits.lower() for part in parts for bits in part["bits"][:1])]
    known = {
        **taken,
        "library_name": "diffusers",
        "base_model": base_model,
        "base_model_relation": None if base_model is None else "quantized",
        "pipeline_tag": tag or taken.get("pipeline_tag"),
    }
    extra = given.get("tags", [])
    merged = {**known, **given, "tags": list(dict.fromkeys([*tags, *extra]))}
    return {key: value for key, value in merged.items() if value is not None}


def _part(name: str, model: ModelMixin, file_bytes: int | None) -> dict[str, Any]:
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
    arguments = ", ".join(f"{key}={value!r}" for key, value in changed.items())
    return f"dq.DQConfig({config.method!r}, {arguments})"


def _calibration(statistics: Statistics) -> dict[str, Any]:
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


def _comparison(comparison: Comparison) -> dict[str, Any]:
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


def _library(shown: type) -> str:
    if getattr(diffusers, shown.__name__, None) is shown:
        return "diffusers"
    return "diffusers_dq.opensora" if shown.__module__.startswith("diffusers_dq.opensora") else shown.__module__


def _call(pipe: DiffusionPipeline | None, call: Mapping[str, Any] | None) -> dict[str, Any]:
    if pipe is None:
        return {}
    takes = python_inspect.signature(type(pipe).__call__).parameters
    if call is None:
        call = {"prompt": _PROMPT} if "prompt" in takes else {"class_labels": [0]} if "class_labels" in takes else {}
    for name, value in call.items():
        if name not in takes:
            raise ValueError(f"call sets {name}, which {type(pipe).__name__} does not take")
        if not _is_literal(value):
            raise ValueError(f"call[{name!r}] is written into the card as Python; expected literals, got {value!r}")
    return dict(call)


def _is_literal(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_literal, value))
    return value is None or isinstance(value, bool | int | float | str)


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    return found


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _cell(text: Any) -> str:
    """For a cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
