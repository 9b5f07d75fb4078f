"""Numbers that are written as text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from maskloss.data.repair.text import with_numbers


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("7", 7),
        (" +7.0 ", 7),
        (".5", 0.5),
        ("1e3", 1000),
        ("9007199254740993", 9007199254740992.0),  # 2**53 + 1 has no exact float
        (["1", [2, "3"], {"x": "4"}], [1, [2, 3], {"x": 4}]),
        ("1 2 3 4 5 6.5", [1, 2, 3, 4, 5, 6.5]),
        ("1,2,3,4,5,6", [1, 2, 3, 4, 5, 6]),
        ('[["1", 2]]', [[1, 2]]),
        ({"size": ["5", "8"], "counts": "12"}, {"size": [5, 8], "counts": "12"}),
        ({"counts": ["1", "2"]}, {"counts": [1, 2]}),
    ],
    ids=str,
)
def test_numbers_and_lists_are_read(value: Any, expected: Any) -> None:
    assert with_numbers(value) == expected
    assert json.dumps(with_numbers(value)) == json.dumps(expected)  # 7 and not 7.0


@pytest.mark.parametrize(
    "value", ["", "abc", "8,5", "1 2 3 4 5", "1,2 3,4 5,6", "nan", "0x10", "1_000", '"7"', True, None, 2.5]
)
def test_everything_else_is_kept(value: Any) -> None:
    assert with_numbers(value) is value


def test_a_box_is_a_list_of_four_numbers() -> None:
    assert with_numbers("1 2 3 4", 4) == [1, 2, 3, 4]


def test_text_that_is_nested_deeply_is_kept() -> None:
    assert with_numbers([[[["7"]]]]) == [[[[7]]]]
    assert with_numbers([[[[["7"]]]]]) == [[[[["7"]]]]]
