"""Checks of the fields in the files that a run reads: the description in a model file, and checkpoints."""

from __future__ import annotations

import math
from typing import Any


def check_field(condition: Any, field: str, expected: str, value: Any) -> None:
    """Raise ValueError, naming the field, unless a condition holds.

    Args:
        condition: what must hold.
        field: name of the field.
        expected: what the field must be, such as "a whole number from 1 on".
        value: what it is.
    """
    if condition:
        return
    shown = str(value) if isinstance(value, str | int | float | list | tuple) else type(value).__name__
    shown = "nothing" if value is None else shown
    raise ValueError(
        f"its {field} must be {expected}, not {shown if len(shown) <= 60 else shown[:57] + '...'}"
    )


def is_whole(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Return whether a value is an integer in [low, high]; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Return whether a value is a finite number in [low, high]; True and False are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value) and low <= value <= high
    except OverflowError:  # an integer beyond what a float holds
        return False


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where there is none."""
    line: str = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line[:200]
