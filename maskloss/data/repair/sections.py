"""The lists of an annotation file, which are its sections, and keys to group their entries by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from maskloss.data.findings import shown
from maskloss.data.reading.entries import whole_number

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

#: Key of each list in the file, by the section's name.
LIST_KEYS = {"image": "images", "annotation": "annotations", "category": "categories"}


def entries(document: dict[str, Any], section: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield position and entry for the entries of a section that are JSON objects."""
    for position, item in enumerate(document[LIST_KEYS[section]]):
        if isinstance(item, dict):
            yield position, item


def id_key(value: Any) -> Any:
    """Return a hashable key for an id, with whole floats as integers."""
    number = whole_number(value)
    if number is not None:
        return number
    return value if isinstance(value, str | float) or value is None else shown(value)


def typed_key(value: Any) -> tuple[type, Any]:
    """Return a hashable key that distinguishes 1, "1", True and 1.0."""
    return type(value), value if isinstance(value, str | int | float) else shown(value)


def grouped(pairs: Iterable[tuple[_Key, _Value]]) -> dict[_Key, list[_Value]]:
    """Return the values of each key, in the order of the pairs."""
    groups: dict[_Key, list[_Value]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
