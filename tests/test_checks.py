# SPDX-License-Identifier: Apache-2.0
from typing import Literal, get_args, get_type_hints

import pytest

from diffusers_dq import DQConfig
from diffusers_dq.checks import check_argument
from diffusers_dq.methods.base import METHODS


@pytest.mark.parametrize(
    "value, hint",
    [
        (1, int),
        (1, float),
        (0.5, float),
        (-1.7976931348623157e308, float | None),
        (10**400, int),
        (True, bool),
        (None, int | None),
        ("a", Literal["a", "b"] | None),
        ("x", str),
    ],
)
def test_values_of_their_type_pass(value, hint):
    check_argument("name", value, hint)


@pytest.mark.parametrize(
    "value, hint, error, message",
    [
        (True, int, TypeError, "name must be of type int; got True"),
        (2.5, int, TypeError, "of type int; got 2.5"),
        ("4", int | None, TypeError, "of type int or None; got '4'"),
        ("no", bool, TypeError, "of type bool; got 'no'"),
        (1, bool, TypeError, "of type bool; got 1"),
        ("c", Literal["a", "b"], ValueError, "one of a, b; got 'c'"),
        (["a"], Literal["a", "b"] | None, ValueError, "one of a, b or None"),
    ],
)
def test_others_are_refused(value, hint, error, message):
    with pytest.raises(error, match=message):
        check_argument("name", value, hint)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -float("inf"), 10**400, -(10**5000)],
    ids=["nan", "inf", "-inf", "large", "small"],
)
@pytest.mark.parametrize("hint", [float, float | None])
def test_a_number_that_is_none_is_refused_where_a_float_is_wanted(value, hint):
    with pytest.raises(ValueError, match="^name must be a finite number; got (nan|-?inf|an integer of [0-9]+ bits)$"):
        check_argument("name", value, hint)


def float_options():
    """(method, option) of every option that takes a float."""
    for name in sorted(METHODS):
        for option, hint in get_type_hints(METHODS[name].Options).items():
            if float in (hint, *get_args(hint)):
                yield name, option


@pytest.mark.parametrize(("method", "option"), float_options())
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_method_takes_an_option_that_is_no_number(method, option, value):
    with pytest.raises(ValueError, match=f"{option} must be a finite number; got {value}"):
        DQConfig(method, **{option: value})


def test_the_methods_have_options_that_are_numbers():
    assert {("auto", "budget"), ("auto", "extra_bits"), ("g4w_p4a", "deviation")} <= set(float_options())


@pytest.mark.parametrize("option", ["learning_rate", "input_learning_rate", "rounding_weight", "warmup", "beta_start"])
def test_reconstruction_takes_none_either(option):
    with pytest.raises(ValueError, match=f"{option} must be a finite number; got nan"):
        DQConfig("ptq4dit", rounding="adaround", reconstruction={option: float("nan")})
