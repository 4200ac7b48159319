# SPDX-License-Identifier: Apache-2.0
"""The configuration that diffusers carries: what to do, and in a saved model also what was done."""

import copy
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from diffusers_dq.affine import RangeSearch
from diffusers_dq.checks import check_argument
from diffusers_dq.files import read_json, write_whole
from diffusers_dq.layout import NOT_ROUNDED, Bits
from diffusers_dq.methods import Method
from diffusers_dq.methods.base import make_method
from diffusers_dq.presets import Preset, settings_of
from diffusers_dq.recipe import Recipe, Reconstruction, Rounding
from diffusers_dq.step_policy import from_runtime, to_runtime

FORMAT_VERSION = 1
_OVERRIDABLE = ("weight_bits", "activation_bits", "group_size")


class DQMethod(StrEnum):
    """diffusers reads `quant_method.value`, so a plain string will not do."""

    DIFFUSERS_DQ = "diffusers_dq"


@dataclass
class DQConfig(QuantizationConfigMixin):
    """How to quantize a diffusion transformer.

    method: a name of `dq.methods()`.   preset: settings by name (presets.py): "quality", "balanced" or "speed" without
        a method, or "paper" for what a method's paper does where the defaults here differ. What else is given stands.
    weight_bits: 4, 6, 8 or 16;   activation_bits: 4 to 8 or 16; 16 is not rounded,
        so activation_bits=16 is weight-only, and 16 with 16 applies the method's transforms and rounds nothing.
    modules_to_not_convert: a module whose dotted name contains one of these strings stays as it is; None is the
        architecture's own list, [] converts every linear that the architecture's spec knows.
    overrides: {glob over module names: {"weight_bits": ..., "activation_bits": ..., "group_size": ...}}, any of the
        three; the last match wins. What a search finds is written here (diffusers_dq/search).
    quantize_attention: also round query, key, value and the probabilities of self-attention.
    statistics: path of a `Statistics` file, for methods that need calibration, or where no such file is, a repository
        on the Hub with one: "user/repo" or "user/repo@revision".
    group_size, rounding, search, low_rank, output_correction, noise_correction: parts that go with any method; see
        Recipe. None is what the method does by itself.
    fold: whether what is upstream of a linear may carry its transforms, at no cost. False makes them all in the layer
        itself, so that every linear reads what the original would: an adapter (LoRA) may sit anywhere then.
    reconstruction: how rounding="adaround" learns, a dict of what `Reconstruction` has.
    guard_steps: (n, m), the first n and last m steps of the calibrated schedule run with activations that are not
        rounded. They are kept as timesteps: (2, 2) of 50 calibrated steps guards twice as many of 100. Written to
        config.json in diffusers' words too, as `runtime`, and read from them; those count steps of the loop, so they
        say the same only of as many steps as were calibrated.
    step_bits: activation bits of as many equal parts of the schedule, from its first to its last.
    options: the method's own, checked against its dataclass.

    Raises TypeError for an unknown option, ValueError for an unknown method or bits out of range.
    """

    def __init__(
        self,
        method: str | None = None,
        weight_bits: int = 8,
        activation_bits: int = 8,
        modules_to_not_convert: Sequence[str] | None = None,
        overrides: Mapping[str, Mapping[str, int]] | None = None,
        quantize_attention: bool | None = None,
        statistics: str | os.PathLike[str] | None = None,
        *,
        preset: Preset | None = None,
        fold: bool = True,
        group_size: int | None = None,
        rounding: Rounding | None = None,
        search: RangeSearch | None = None,
        low_rank: int | None = None,
        output_correction: bool | None = None,
        noise_correction: bool | None = None,
        reconstruction: Mapping[str, Any] | None = None,
        guard_steps: Sequence[int] | None = None,
        step_bits: Sequence[int] | None = None,
        runtime: Mapping[str, Any] | None = None,
        result: Mapping[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = DQMethod.DIFFUSERS_DQ.value,
        **options: Any,
    ) -> None:
        if quant_method != DQMethod.DIFFUSERS_DQ:
            raise ValueError(f"quant_method is {quant_method!r}, a DQConfig's is {DQMethod.DIFFUSERS_DQ.value!r}")
        if not isinstance(format_version, int) or not isinstance(result, Mapping | None):
            raise ValueError(
                f"config.json is damaged: format_version is {format_version!r}, an integer is expected; result is a"
                f" {type(result).__name__}, an object is expected. Load the original file"
            )
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"the model was saved in format {format_version}, this diffusers_dq reads up to {FORMAT_VERSION}:"
                " upgrade diffusers_dq"
            )
        check_argument("preset", preset, Preset | None)
        if preset is None and method is None:
            raise TypeError("DQConfig needs a method, a name of dq.methods(), or a preset; got neither")
        check_argument("method", method, str | None)
        settings: dict[str, Any] = {"method": method} if preset is None else settings_of(preset, method)
        check_argument("quantize_attention", quantize_attention, bool | None)
        check_argument("fold", fold, bool)
        check_argument("reconstruction", reconstruction, Mapping | None)
        check_argument("statistics", statistics, str | os.PathLike | None)
        if not _is_list_of_strings(modules_to_not_convert):
            raise ValueError(f"modules_to_not_convert must be a list of strings, got {modules_to_not_convert!r}")
        if not isinstance(overrides, Mapping | None) or not all(
            isinstance(glob, str) and isinstance(bits, Mapping) for glob, bits in (overrides or {}).items()
        ):
            raise ValueError(
                f'overrides must be a dict like {{"*.ff.net.2": {{"weight_bits": 8}}}}, got {overrides!r}'
            )
        self.quant_method = DQMethod.DIFFUSERS_DQ
        self.format_version = format_version
        self.method: str = settings.pop("method")
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.overrides = {glob: dict(bits) for glob, bits in (overrides or {}).items()}
        self.quantize_attention = quantize_attention
        self.fold = fold
        self.group_size = group_size
        self.rounding = rounding
        self.search = search
        self.low_rank = low_rank
        self.output_correction = output_correction
        self.noise_correction = noise_correction
        self.reconstruction = dict(reconstruction or {})
        self.guard_steps = _guard_steps(guard_steps, runtime)
        check_argument("step_bits", step_bits, list | tuple | None)
        self.step_bits = None if step_bits is None else list(step_bits)
        self.statistics = None if statistics is None else os.fspath(statistics)
        self.options = dict(options)
        self.result = None if result is None else copy.deepcopy(dict(result))
        self._fill_in({**settings, "quantize_attention": settings.get("quantize_attention", False)})
        if self.result is None:  # a quantized model's layers say all themselves: its method need not be known here
            self._check()

    def _fill_in(self, settings: Mapping[str, Any]) -> None:
        """A preset's, wherever nothing else was said."""
        for name, value in settings.items():
            if not hasattr(self, name):
                self.options.setdefault(name, value)
            elif getattr(self, name) is None:
                setattr(self, name, value)

    def _check(self) -> None:
        self.recipe_of("")  # raises where method, options or recipe are wrong
        self.reconstruction_settings()
        if self.step_bits == []:
            raise ValueError("step_bits must hold the bits of at least one part of the schedule, got []")
        for of_steps in self.step_bits or ():
            Bits(self.weight_bits, of_steps)
        if self.has_step_policy and self.activation_bits == NOT_ROUNDED:
            raise ValueError("guard_steps and step_bits change activation_bits, which is 16 (not rounded)")
        Bits(self.weight_bits, self.activation_bits)
        for glob, bits in self.overrides.items():
            unknown = set(bits) - set(_OVERRIDABLE)
            if unknown:
                raise ValueError(f"overrides[{glob!r}] sets {sorted(unknown)}; it may set {', '.join(_OVERRIDABLE)}")
            self.recipe_of(glob)
            self._overridden(Bits(self.weight_bits, self.activation_bits), bits)
        if self.quantize_attention and self.activation_bits == NOT_ROUNDED:
            raise ValueError("quantize_attention=True rounds to activation_bits, which is 16 (not rounded)")

    @property
    def needs_statistics(self) -> bool:
        """Of the inputs of linears."""
        return self.make_method().needs_statistics or self.recipe.needs_statistics or self.has_step_policy

    @property
    def has_step_policy(self) -> bool:
        """Whether activation bits change with the step; the calibrated schedule says where."""
        return self.step_bits is not None or any(self.guard_steps or ())

    @property
    def recipe(self) -> Recipe:
        """The method's, with what this configuration changes."""
        given = {field.name: getattr(self, field.name) for field in fields(Recipe)}
        changed = {name: value for name, value in given.items() if value is not None}
        return replace(self.make_method().recipe, **changed)

    def is_overridden(self, module: str) -> bool:
        return any(fnmatchcase(module, glob) for glob in self.overrides)

    def reconstruction_settings(self) -> Reconstruction:
        known = [field.name for field in fields(Reconstruction)]
        unknown = sorted(set(self.reconstruction) - set(known))
        if unknown:
            raise TypeError(f"reconstruction has no {', '.join(unknown)}; it may set {', '.join(known)}")
        return Reconstruction(**self.reconstruction)

    def recipe_of(self, module: str) -> Recipe:
        recipe = self.recipe
        for glob, override in self.overrides.items():
            if "group_size" in override and fnmatchcase(module, glob):
                recipe = replace(recipe, group_size=override["group_size"])
        return recipe

    def make_method(self) -> Method:
        return make_method(self.method, self.options, _SETTINGS)

    def bits_of(self, module: str) -> Bits:
        bits = Bits(self.weight_bits, self.activation_bits)
        for glob, override in self.overrides.items():
            if fnmatchcase(module, glob):
                bits = self._overridden(bits, override)
        return bits

    @staticmethod
    def _overridden(bits: Bits, override: Mapping[str, int]) -> Bits:
        return Bits(override.get("weight_bits", bits.weight), override.get("activation_bits", bits.activation))

    def copy(self, **changes: Any) -> "DQConfig":
        return DQConfig.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `DQConfig(**config.to_dict())` is the same configuration. Options stand beside the rest."""
        fields = copy.deepcopy(self.__dict__)
        options = fields.pop("options")
        fields["quant_method"] = self.quant_method.value
        if self.guard_steps is not None:
            fields["guard_steps"] = list(self.guard_steps)
            fields["runtime"] = to_runtime(self.guard_steps)
        return {**{key: value for key, value in fields.items() if not key.startswith("_")}, **options}

    def to_diff_dict(self) -> dict[str, Any]:
        """Without the bulky record of results: what repr() shows."""
        return {key: value for key, value in self.to_dict().items() if key != "result" and value not in (None, {})}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**{**config_dict, **kwargs})
        return (config, {}) if return_unused_kwargs else config

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """What `from_json_file` reads, all or nothing. Raises OSError where it cannot be written."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        write_whole(Path(json_file_path), lambda file: file.write(text.encode()))

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> "DQConfig":
        """What `to_json_file` wrote. Raises FileNotFoundError, ValueError for a file that is no configuration."""
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}; expected a file from DQConfig.to_json_file") from error
        if not isinstance(content, dict) or "method" not in content:
            raise ValueError(f"{path} holds no quantization config: expected an object with a method")
        return cls(**content)

    def __repr__(self) -> str:
        return f"DQConfig {json.dumps(self.to_diff_dict(), indent=2, sort_keys=True)}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DQConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _guard_steps(guard: Any, runtime: Any) -> tuple[int, int] | None:
    check_argument("guard_steps", guard, list | tuple | None)
    check_argument("runtime", runtime, Mapping | None)
    given = None if guard is None else tuple(guard)
    if given is not None and (len(given) != 2 or not all(type(count) is int and count >= 0 for count in given)):
        raise ValueError(f"guard_steps must be two whole numbers, of first and last steps, got {guard!r}")
    if runtime is None:
        return given
    worded = from_runtime(runtime)
    if given not in (None, worded):
        raise ValueError(f"guard_steps is {given}, and runtime says {worded}: give one of them")
    return worded


def _is_list_of_strings(value: Any) -> bool:
    return value is None or (
        isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, str) for item in value)
    )


__all__ = ["FORMAT_VERSION", "Bits", "DQConfig", "DQMethod"]


_SETTINGS = tuple(inspect.signature(DQConfig).parameters)
