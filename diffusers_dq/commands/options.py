# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have, under one name and with one meaning."""

import functools
import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from diffusers import DiffusionPipeline

from diffusers_dq import DQConfig, methods
from diffusers_dq.denoise import DENOISERS
from diffusers_dq.evaluation.loading import DTYPES, class_labels, read_prompts
from diffusers_dq.presets import OURS

_MODEL = "folder of a pipeline, or OWNER/NAME[@REVISION] on the Hub"
_OWN_OPTIONS = {
    "prompt": "--prompt",
    "class_labels": "--class-labels",
    "guidance_scale": "--guidance",
    "num_inference_steps": "--steps",
}
_DEFAULT_LABELS = 16  # pictures that a class-conditional model makes when nothing is said


def _known(dtype: str) -> str:
    if dtype not in DTYPES:
        raise typer.BadParameter(f"expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)]
Guidance = Annotated[float | None, typer.Option("--guidance", help="guidance scale; by default the pipeline's")]
Prompts = Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help="text file, a prompt a line")]
Argument = Annotated[
    list[str] | None,
    typer.Option("--argument", metavar="KEY=VALUE", help="of the pipeline's call, as height=512; may repeat"),
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="denoising steps")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="of the first call; call i has seed + i")]
Method = Annotated[str | None, typer.Option("--method", metavar="NAME", help=f"of {', '.join(methods())}")]
Preset = Annotated[
    str | None, typer.Option("--preset", metavar="NAME", help=f"{', '.join(OURS)}; or paper, with --method")
]
WeightBits = Annotated[int | None, typer.Option("--weight-bits", help="4, 6, 8 or 16; 8 unless said")]
ActivationBits = Annotated[int | None, typer.Option("--activation-bits", help="4 to 8 or 16; 8 unless said")]
Option = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="any other of DQConfig, as rounding=gptq; may repeat"),
]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="JSON of DQConfig.to_json_file, instead of the above")
]
StatisticsFile = Annotated[
    str | None,
    typer.Option(
        "--statistics",
        metavar="FILE",
        help="what diffusers-dq calibrate wrote; or OWNER/NAME[@REVISION] of a repository that holds it",
    ),
]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="for what is written")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="write into a folder that is not empty")]
Device = Annotated[str, typer.Option("--device", help="as cpu or cuda:1; by default a GPU where there is one")]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help=f"of what is not quantized: {', '.join(DTYPES)}", callback=_known),
]
Component = Annotated[
    str | None, typer.Option("--component", metavar="NAME", help=f"of a pipeline with two: {' or '.join(DENOISERS)}")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, for machines")]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a pipeline is to be called with: the options of a command that is `calling`.

    Raises typer.BadParameter, before a model is loaded, for more than one of prompts, class labels and calls, or for
    one that cannot be read.
    """

    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="a prompt; may repeat")] = None
    prompts: Prompts = None
    class_labels: Annotated[str, typer.Option("--class-labels", metavar="LABELS", help="as 207,360 or 0-9")] = ""
    calls: Annotated[
        Path | None,
        typer.Option(
            "--calls", metavar="FILE", help="JSON: a list of objects, each the arguments of one pipeline call"
        ),
    ] = None
    guidance: Guidance = None
    argument: Argument = None
    batch: Annotated[int, typer.Option("--batch", min=1, help="class labels or prompts a call")] = 8

    def __post_init__(self) -> None:
        given = {
            "--prompt": self.prompt,
            "--prompts": self.prompts,
            "--class-labels": self.class_labels,
            "--calls": self.calls,
        }
        named = [name for name, value in given.items() if value]
        if len(named) > 1:
            raise typer.BadParameter(f"give one of {' and '.join(named)}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise typer.BadParameter(f"--guidance must be a number, got {self.guidance}")
        for name in key_values("--argument", self.argument).keys() & _OWN_OPTIONS.keys():
            raise typer.BadParameter(f"--argument {name}: it has an option of its own, {_OWN_OPTIONS[name]}")
        self._texts()
        self._labels()
        self._read_calls()

    def calls_of(self, pipe: DiffusionPipeline) -> list[dict[str, Any]]:
        """Of a class-conditional pipeline with nothing said, 16 labels evenly spread over its classes.

        Raises typer.BadParameter where the pipeline takes something else or needs to be told.
        """
        if self.calls is not None:
            return [self._further() | call for call in self._read_calls()]
        takes = inspect.signature(pipe.__call__).parameters
        texts, labels = self._texts(), self._labels()
        values: Sequence[Any]
        if "class_labels" in takes and "prompt" not in takes:
            if texts:
                raise typer.BadParameter(f"{type(pipe).__name__} takes --class-labels, not prompts")
            values, name = _checked_labels(pipe, labels or _spread(pipe)), "class_labels"
        elif labels:
            raise typer.BadParameter(f"{type(pipe).__name__} takes no class labels; give --prompt or --calls")
        elif not texts:
            raise typer.BadParameter(f"say what {type(pipe).__name__} is to make: --prompt, --prompts or --calls")
        else:
            values, name = texts, "prompt"
        batches = [values[i : i + self.batch] for i in range(0, len(values), self.batch)]
        return [{name: list(batch)} | self._further() for batch in batches]

    def _texts(self) -> list[str]:
        if self.prompts is None:
            return list(self.prompt or ())
        try:
            return read_prompts(self.prompts)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    def _labels(self) -> list[int]:
        labels: list[int] = []
        for part in filter(None, self.class_labels.replace(" ", "").split(",")):
            first, dash, last = part.partition("-")
            if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
                raise typer.BadParameter(f"--class-labels are numbers and ranges, as 207,360 or 0-9; got {part!r}")
            labels += range(int(first), int(last or first) + 1)
        return labels

    def _read_calls(self) -> list[dict[str, Any]]:
        if self.calls is None:
            return []
        content = _json_file(self.calls, "--calls")
        if not isinstance(content, list) or not content or not all(isinstance(call, dict) for call in content):
            raise typer.BadParameter(
                f'--calls {self.calls} must hold a list of objects, as [{{"prompt": "a lighthouse"}}]'
            )
        return content

    def _further(self) -> dict[str, Any]:
        guidance = {} if self.guidance is None else {"guidance_scale": self.guidance}
        return guidance | key_values("--argument", self.argument)


def calling(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its parameter `conditions: Conditions` given as the options that are the fields of it."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        conditions = Conditions(**{field.name: given.pop(field.name) for field in fields(Conditions)})
        command(conditions=conditions, **given)

    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(Conditions)
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        parameters += options if parameter.annotation is Conditions else [own]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def config_of(
    method: str | None,
    preset: str | None,
    weight_bits: int | None,
    activation_bits: int | None,
    option: Sequence[str] | None,
    config: Path | None,
    statistics: Path | None = None,
) -> DQConfig:
    """Raises typer.BadParameter for settings that DQConfig refuses, and for --config beside others."""
    beside = [method, preset, weight_bits, activation_bits, option or None]
    if config is not None and any(value is not None for value in beside):
        raise typer.BadParameter("--config says it all; leave out --method, --preset, bits and --option")
    try:
        if config is not None:
            found = DQConfig.from_json_file(config)
            return found.copy(statistics=str(statistics)) if statistics is not None else found
        if method is None and preset is None:
            raise typer.BadParameter(f"give --preset ({', '.join(OURS)}), --method (--help lists them) or --config")
        settings: dict[str, Any] = {
            "method": method,
            "preset": preset,
            "weight_bits": 8 if weight_bits is None else weight_bits,
            "activation_bits": 8 if activation_bits is None else activation_bits,
            "statistics": statistics,
        }
        further = key_values("--option", option)
        twice = sorted(settings.keys() & further.keys())
        if twice:
            raise typer.BadParameter(f"{', '.join(twice)}: options of their own, not --option")
        return DQConfig(**settings, **further)
    except (ValueError, TypeError, KeyError, OSError) as error:
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise typer.BadParameter(str(said)) from None


def key_values(option: str, given: Sequence[str] | None) -> dict[str, Any]:
    """KEY=VALUE; a value that is no JSON is a string, and true, false and null may be Python's."""
    found: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"{option} must be KEY=VALUE, as height=512; got {text!r}")
        try:
            found[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except ValueError:
            found[name] = value
    return found


def _json_file(path: Path, option: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise typer.BadParameter(f"{option} {path} is no JSON file ({error})") from None


def _number_of_classes(pipe: DiffusionPipeline) -> int | None:
    return getattr(getattr(pipe, "transformer", None), "config", {}).get("num_embeds_ada_norm")


def _spread(pipe: DiffusionPipeline) -> list[int]:
    named = class_labels(pipe, None)
    if not named:
        raise typer.BadParameter(f"say what {type(pipe).__name__} is to make: --class-labels")
    return [int(named[i * len(named) // _DEFAULT_LABELS]) for i in range(_DEFAULT_LABELS)]


def _checked_labels(pipe: DiffusionPipeline, labels: Sequence[int]) -> list[int]:
    classes = _number_of_classes(pipe)
    wrong = [label for label in labels if classes is not None and label >= classes]
    if wrong:
        raise typer.BadParameter(f"--class-labels {wrong[0]}: the model has the classes 0 to {(classes or 0) - 1}")
    return list(labels)
