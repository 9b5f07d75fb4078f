"""Decoding a large JSON object, the elements of its long lists one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

_after_space = re.compile(r"[ \t\n\r]*").match


def decoded(content: bytes) -> str:
    """Decode JSON's text: UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        UnicodeDecodeError: it is none of these.
    """
    return content.decode(json.detect_encoding(content), "surrogatepass")


def without_trailing_commas(text: str) -> str:
    """Remove commas before a closing bracket, which JSON has no place for, outside of strings."""
    return re.sub(r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])', lambda match: match[1] or "", text)


def decode_object(text: str, streamed: Mapping[str, Callable[[], Callable[[Any], None]]]) -> Any:
    """Decode JSON as `json.loads` does, without ever holding a streamed list.

    Args:
        text: the JSON.
        streamed: for a key of the outermost object, what makes the function that takes the elements of its
            list one by one. In the result an empty list stands in the list's place. It is called once more where the
            key is there twice, since the last one counts.

    Raises:
        json.JSONDecodeError: the text is no JSON; the message has line and column.
        RecursionError: it is nested too deeply.
    """
    decode = json.JSONDecoder().raw_decode
    position = _skip(text, 0)
    if text[position : position + 1] != "{":
        return json.loads(text)
    result: dict[str, Any] = {}
    position = _skip(text, position + 1)
    if text[position : position + 1] == "}":
        return _ended(result, text, position + 1)
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
            return _ended(result, text, position + 1)
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
    assert match is not None  # it may match nothing, but it matches
    return match.end()


def _ended(result: dict[str, Any], text: str, position: int) -> dict[str, Any]:
    position = _skip(text, position)
    if position != len(text):
        raise json.JSONDecodeError("Extra data", text, position)
    return result
