"""Numbers and lists of numbers that are written as text."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?\s*")
#: Depth of nesting down to which text is converted.
_MAX_DEPTH = 4


def with_numbers(value: Any, least: int = 6, depth: int = 0) -> Any:
    """Return a value with the numbers and the lists that its text spells.

    Text is a number, JSON, or a list of numbers with either commas or spaces between them. A shorter list than `least`
    is ambiguous: "8,5" is a point or a number with a decimal comma.
    """
    if depth > _MAX_DEPTH:
        return value
    if isinstance(value, list):
        return [with_numbers(part, least, depth + 1) for part in value]
    if isinstance(value, dict):
        # Compressed counts are text.
        return {key: part if isinstance(part, str) and key == "counts" else with_numbers(part, least, depth + 1)
                for key, part in value.items()}  # fmt: skip
    if not isinstance(value, str):
        return value
    if _NUMBER.fullmatch(value):
        number = float(value)
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(value)
        if isinstance(found, list | dict):
            return with_numbers(found, least, depth + 1)
    words = value.split(",") if "," in value else value.split()
    if len(words) >= least and all(map(_NUMBER.fullmatch, words)):
        return [with_numbers(word) for word in words]
    return value
