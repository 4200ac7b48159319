# SPDX-License-Identifier: Apache-2.0
"""Arguments checked against their annotations, once, where they come in."""

import sys
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_argument(name: str, value: Any, hint: Any) -> None:
    """Raises ValueError for a value that is none of a Literal's and for a float that is not finite, which compares
    with nothing or bounds nothing; TypeError for one of another type than the hint.

    hint: a class, None, Literal, or a union of them. A bool is no int here, and an int is a float if one holds it.
    """
    if _fits(value, hint):
        if float in _alternatives(hint) and isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name} must be a finite number; got {_shown(value)}")
        return
    error = ValueError if _has_choices(hint) else TypeError
    raise error(f"{name} must be {_describe(hint)}; got {value!r}")


def check_fields(options: Any) -> None:
    """`check_argument` for every field of a dataclass instance."""
    hints = get_type_hints(type(options))
    for field in fields(options):
        check_argument(field.name, getattr(options, field.name), hints[field.name])


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _has_choices(hint: Any) -> bool:
    return any(get_origin(alternative) is Literal for alternative in _alternatives(hint))


def _fits(value: Any, hint: Any) -> bool:
    if hint is None or hint is NoneType:
        return value is None
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, alternative) for alternative in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _shown(value: float) -> str:
    """Python itself refuses to write out integers of more than 4300 digits."""
    return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else repr(value)


def _describe(hint: Any) -> str:
    def name(alternative: Any) -> str:
        if get_origin(alternative) is Literal:
            return f"one of {', '.join(map(str, get_args(alternative)))}"
        return "None" if alternative in (None, NoneType) else f"of type {alternative.__name__}"

    return " or ".join(name(alternative) for alternative in _alternatives(hint))
