"""Decoding of large JSON objects, with the elements of long lists passed on one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

_after_space = re.compile(r"[ \t\n\r]*").match


def decoded(content: bytes) -> str:
    """Decode the text of a JSON file: UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        UnicodeDecodeError: the text is in none of these encodings.
    """
    return content.decode(json.detect_encoding(content), "surrogatepass")


def without_trailing_commas(text: str) -> str:
    """Remove commas before closing brackets, which JSON does not allow, except inside strings."""
    return re.sub(r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])', lambda match: match[1] or "", text)


def decode_object(text: str, streamed: Mapping[str, Callable[[], Callable[[Any], None]]]) -> Any:
    """Decode JSON as `json.loads` does, but stream the elements of some lists instead of storing the lists.

    Args:
        text: the JSON.
        streamed: for each streamed key of the outermost object, a function that is called when its list begins, and
            returns the function that takes the list's elements one by one. In the result, the list is empty. If a key
            occurs again, the first function is called again, because the last value counts.

    Raises:
        json.JSONDecodeError: the text is not valid JSON; the message has the line and column.
        RecursionError: the JSON is nested too deeply.
    """
    decode = json.JSONDecoder().raw_decode
    position = _skip(text, 0)
    if text[position : position + 1] != "{":
        return json.loads(text)
    result: dict[str, Any] = {}
    position = _skip(text, position + 1)
    if text[position : position + 1] == "}":
        return _finish(result, text, position + 1)
    while True:
        if text[position : position + 1] != '"':
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, position)
        key, position = decode(text, position)
        position = _skip(text, position)
        if text[position : position + 1] != ":":
            raise json.JSONDecodeError("Expecting ':' delimiter", text, position)
        position = _skip(text, position + 1)
        if key in streamed and text[position : position + 1] == "[":
            result[key] = []
            position = _decode_list(text, position, streamed[key](), decode)
        else:
            result[key], position = decode(text, position)
        position = _skip(text, position)
        if text[position : position + 1] == "}":
            return _finish(result, text, position + 1)
        if text[position : position + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        position = _skip(text, position + 1)


def _decode_list(text: str, position: int, take: Callable[[Any], None], decode: Any) -> int:
    position = _skip(text, position + 1)
    if text[position : position + 1] == "]":
        return position + 1
    while True:
        element, position = decode(text, position)
        take(element)
        if text[position : position + 1] != ",":
            position = _skip(text, position)
            if text[position : position + 1] == "]":
                return position + 1
            if text[position : position + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        position = _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    match = _after_space(text, position)
    assert match is not None  # the pattern also matches the empty string
    return match.end()


def _finish(result: dict[str, Any], text: str, position: int) -> dict[str, Any]:
    position = _skip(text, position)
    if position != len(text):
        raise json.JSONDecodeError("Extra data", text, position)
    return result
