"""Entries of the sections, and keys to group them by."""

from __future__ import annotations

from typing import Any

import pytest

from maskloss.data.repair.sections import entries, grouped, id_key, typed_key


def test_entries_keep_their_positions_among_those_that_are_no_objects() -> None:
    document = {"images": [5, {"id": 1}, None, {"id": 2}], "annotations": [], "categories": []}
    assert list(entries(document, "image")) == [(1, {"id": 1}), (3, {"id": 2})]
    assert list(entries(document, "category")) == []


@pytest.mark.parametrize(
    ("value", "key"), [(3, 3), (3.0, 3), (2.5, 2.5), ("3", "3"), (None, None), (True, "True"), ([3], "[3]")]
)
def test_ids_are_equal_as_whole_numbers_only(value: Any, key: Any) -> None:
    assert id_key(value) == key
    assert type(id_key(value)) is type(key)


def test_typed_keys_distinguish_what_python_calls_equal() -> None:
    values = [1, 1.0, True, "1", [1], None]
    assert len({typed_key(value) for value in values}) == len(values)
    assert typed_key([1]) == typed_key([1])


def test_grouped_keeps_the_order() -> None:
    assert grouped([("b", 1), ("a", 2), ("b", 0)]) == {"b": [1, 0], "a": [2]}
