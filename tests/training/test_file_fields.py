"""maskloss/training/file_fields.py: the checks of a field, and the one line that an error is cut to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from maskloss.training.file_fields import check_field, first_line, is_number, is_whole

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x", "x"),
        (-3, "-3"),
        (1.5, "1.5"),
        (True, "True"),
        ([1, 2], "[1, 2]"),
        ((1,), "(1,)"),
        (None, "nothing"),
        ({"a": 1}, "dict"),
        (b"x", "bytes"),
        ("y" * 60, "y" * 60),
        ("y" * 61, "y" * 57 + "..."),
    ],
)
def test_the_message_has_the_field_what_it_must_be_and_its_value(value: Any, shown: str) -> None:
    with pytest.raises(ValueError, match="its step must be") as caught:
        check_field(False, "step", "an integer >= 1", value)
    assert str(caught.value) == f"its step must be an integer >= 1, not {shown}"


def test_a_condition_that_holds_raises_nothing() -> None:
    check_field(True, "step", "an integer >= 1", 3)
    check_field([0], "categories", "a list", [0])


@pytest.mark.parametrize(
    ("value", "whole", "number"),
    [
        (3, True, True),
        (0, True, True),
        (-3, True, True),
        (10**400, True, False),  # more than a float can hold
        (3.0, False, True),
        (-1.5, False, True),
        (True, False, False),
        (False, False, False),
        (NAN, False, False),
        (INF, False, False),
        (-INF, False, False),
        ("3", False, False),
        (None, False, False),
        ([3], False, False),
        (torch.tensor(3), False, False),
    ],
    ids=str,
)
def test_what_counts_as_whole_and_as_a_number(value: Any, whole: bool, number: bool) -> None:
    assert is_whole(value) is whole
    assert is_number(value) is number


@pytest.mark.parametrize("check", [is_whole, is_number])
def test_both_bounds_are_allowed_values(check: Any) -> None:
    assert [value for value in range(10) if check(value, 2, 5)] == [2, 3, 4, 5]
    assert [value for value in range(10) if check(value, low=8)] == [8, 9]
    assert [value for value in range(10) if check(value, high=1)] == [0, 1]
    assert not check(1, -math.inf, 0)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one  \ntwo"), "one  "),
        (ValueError(""), "ValueError"),
        (EOFError(), "EOFError"),
        (KeyError("a"), "'a'"),
        (ValueError("x" * 201), "x" * 200),
    ],
    ids=repr,
)
def test_an_error_is_cut_to_its_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
