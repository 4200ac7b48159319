# SPDX-License-Identifier: Apache-2.0
from typing import Literal

import pytest

from diffusers_dq.checks import check_argument


@pytest.mark.parametrize(
    "value, hint",
    [
        (1, int),
        (1, float),
        (0.5, float),
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
