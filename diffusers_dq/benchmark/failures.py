# SPDX-License-Identifier: Apache-2.0
"""Why a contestant could not be measured, short enough for a table."""

_LONGEST = 400


def reason_of(error: BaseException) -> str:
    """The exception's class and the beginning of its message, on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
