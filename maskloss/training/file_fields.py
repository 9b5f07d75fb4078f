"""Checks of the fields in files that a run reads: model descriptions and checkpoints."""

from __future__ import annotations

import math
from typing import Any

from maskloss.data.reading import entries


def check_field(condition: Any, field: str, expected: str, value: Any) -> None:
    """Raise ValueError that names the field, unless a condition holds.

    Args:
        condition: must be true.
        field: name of the field.
        expected: what the field must be, such as "an integer >= 1".
        value: the field's value, shown in the message if it is short and plain.
    """
    if condition:
        return
    shown = str(value) if isinstance(value, str | int | float | list | tuple) else type(value).__name__
    shown = "nothing" if value is None else shown
    raise ValueError(
        f"its {field} must be {expected}, not {shown if len(shown) <= 60 else shown[:57] + '...'}"
    )


def is_whole(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Return whether a value is an integer in [low, high]. True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Return whether a value is a finite number in [low, high]. True and False are not."""
    return entries.is_number(value) and bool(low <= value <= high)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters, or its type if the message is empty."""
    line: str = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line[:200]
