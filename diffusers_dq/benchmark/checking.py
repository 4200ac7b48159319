# SPDX-License-Identifier: Apache-2.0
"""What the content of a results file must be for reports, bars and plots to read it."""

from collections.abc import Collection, Mapping
from typing import Any

Kinds = type | tuple[type, ...]

_NUMBER = (int, float)
_FILE: dict[str, Kinds] = {"about": dict, "groups": list, "bars": list}
_ABOUT: dict[str, Kinds] = {
    "hardware": str,
    "device": str,
    "threads": int,
    "versions": dict,
    "driver": object,
    "date": str,
    "commit": (str, type(None)),
    "dirty": (bool, type(None)),
    "settings": dict,
}
_SETTINGS: dict[str, Kinds] = {"rounds": int, "scope": str, "cuda_graphs": bool}
_GROUP: dict[str, Kinds] = {"kind": str, "name": str, "settings": dict, "rows": list}
_OF_GROUP: dict[str, Kinds] = {
    "failed": str,
    "title": str,
    "definition": str,
    "int8_tops": _NUMBER,
    "roofline_ms": _NUMBER,
}
_PRODUCT: dict[str, Kinds] = {"model": str, "m": int, "n": int, "k": int}
_MODEL: dict[str, Kinds] = {
    **dict.fromkeys(("layers", "heads", "head_dim", "frames", "tokens", "batch"), int),
    "cfg": bool,
}
_SIZES = {"gemm": _PRODUCT, "peak": _PRODUCT, "step": _MODEL, "pipeline": _MODEL}
_TIMES: dict[str, Kinds] = dict.fromkeys(("median_ms", "quartile_low_ms", "quartile_high_ms"), _NUMBER)
_CONTESTANT: dict[str, Kinds] = {"mode": str, "kind": str}
_KINDS = ("baseline", "ours", "peer")
_OF_ROW: dict[str, Kinds] = dict.fromkeys(
    (
        "tops",
        "of_int8_peak",
        "times_int_mm",
        "times_bf16_compiled",
        "times_bf16_eager",
        "weight_bytes",
        "peak_bytes",
        "latents_per_second",
    ),
    _NUMBER,
)
_PROFILE: dict[str, Kinds] = {"ms": _NUMBER, "entries": list}
_ENTRY: dict[str, Kinds] = {"name": str, "calls": _NUMBER, "ms": _NUMBER}


def check(content: Any) -> None:
    """Raises ValueError, which says where and what, for anything but the content of a results file."""
    _require("the file", content, _FILE)
    _require("about", content["about"], _ABOUT)
    _require("about.settings", content["about"]["settings"], _SETTINGS)
    for i, group in enumerate(content["groups"]):
        _check_group(f"groups[{i}]", group)


def _check_group(where: str, group: Any) -> None:
    _require(where, group, _GROUP, _OF_GROUP)
    kind = group["kind"]
    _one_of(f"{where}.kind", kind, _SIZES)
    if "definition" in group:
        _require(where, group, {"int8_tops": _NUMBER})
    _require(f"{where}.settings", group["settings"], _SIZES[kind])
    for i, row in enumerate(group["rows"]):
        _check_row(f"{where}.rows[{i}]", row, _CONTESTANT if _SIZES[kind] is _MODEL else {})


def _check_row(where: str, row: Any, fields: Mapping[str, Kinds]) -> None:
    _require(where, row, {"name": str, **fields}, {"failed": str, "profile": dict, **_OF_ROW})
    if "kind" in fields:
        _one_of(f"{where}.kind", row["kind"], _KINDS)
    if "failed" not in row:
        _require(where, row, _TIMES)
    profile = row.get("profile", {"failed": ""})
    _require(f"{where}.profile", profile, {"failed": str} if "failed" in profile else _PROFILE)
    for i, entry in enumerate(profile.get("entries", ())):
        _require(f"{where}.profile.entries[{i}]", entry, _ENTRY)


def _require(where: str, given: Any, fields: Mapping[str, Kinds], optional: Mapping[str, Kinds] | None = None) -> None:
    """fields: that an object must have.   optional: that it may have, of these types."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {_named(given)}, expected an object")
    for name, kinds in {**fields, **(optional or {})}.items():
        if name not in given:
            if name in fields:
                raise ValueError(f"{where} has no {name!r}")
        elif not _is_a(given[name], kinds):
            raise ValueError(f"{where}.{name} is {_named(given[name])}, expected {_names(kinds)}")


def _is_a(value: Any, kinds: Kinds) -> bool:
    """isinstance, but true and false are no numbers."""
    types = kinds if isinstance(kinds, tuple) else (kinds,)
    return type(value) in types if isinstance(value, bool) else isinstance(value, types)


def _one_of(where: str, given: str, known: Collection[str]) -> None:
    if given not in known:
        raise ValueError(f"{where} is {given!r}, expected one of {', '.join(known)}")


_NAMES = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}


def _named(value: Any) -> str:
    return _NAMES.get(type(value), "null")


def _names(kinds: Kinds) -> str:
    types = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join(dict.fromkeys(_NAMES.get(kind, "null") for kind in types))
