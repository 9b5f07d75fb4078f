"""`maskloss.losses.checks`."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from maskloss.losses.checks import (
    check_class_values,
    check_in_range,
    check_integer,
    check_positive,
    check_reduction,
    check_same_shape,
)


def test_equal_shapes_pass():
    check_same_shape(logits=torch.zeros(2, 3), labels=torch.ones(2, 3), weights=torch.ones(2, 3))
    check_same_shape(logits=torch.zeros(0, 3), labels=torch.ones(0, 3))


@pytest.mark.parametrize("other", [(1, 3), (3,), (3, 2), ()])
def test_shapes_that_would_broadcast_or_not_raise_with_every_name(other):
    with pytest.raises(ValueError, match=re.escape(f"shapes differ: a (2, 3), b (2, 3), c {other}")):
        check_same_shape(a=torch.zeros(2, 3), b=torch.zeros(2, 3), c=torch.zeros(other))


@pytest.mark.parametrize("value", [0, 0.5, 1])
def test_values_in_the_range_pass_with_both_ends(value):
    check_in_range(0, 1, alpha=value)


@pytest.mark.parametrize("value", [-1e-9, 1.1, math.nan, math.inf, -math.inf])
def test_a_value_outside_of_the_range_raises_by_name(value):
    with pytest.raises(ValueError, match=rf"^beta must be in \[0, 1\], got {value}$"):
        check_in_range(0, 1, alpha=0.5, beta=value)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_without_an_upper_end_a_value_must_be_finite(value):
    check_in_range(0, gamma=1e30)
    with pytest.raises(ValueError, match=f"^gamma must be >= 0 and finite, got {value}$"):
        check_in_range(0, gamma=value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_a_value_that_is_not_positive_and_finite_raises_by_name(value):
    check_positive(smooth=1e-30, gamma=3)
    with pytest.raises(ValueError, match=f"^gamma must be > 0 and finite, got {value}$"):
        check_positive(smooth=1.0, gamma=value)


@pytest.mark.parametrize("value", ["1e-4", None, [1.0], (1, 2)], ids=str)
@pytest.mark.parametrize("check", [check_positive, lambda **knobs: check_in_range(0, 1, **knobs)])
def test_a_knob_that_is_no_number_raises_by_name(check, value):
    # PyYAML reads 1e-4 as a string.
    message = re.escape(f"gamma must be a number, not {type(value).__name__} {value!r}")
    with pytest.raises(TypeError, match=f"^{message}$"):
        check(smooth=1.0, gamma=value)


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5), True])
def test_numbers_of_other_kinds_pass(value):
    check_positive(gamma=value)
    check_in_range(0, 1, gamma=value)


def test_integers_of_any_kind_pass():
    check_integer(width=5, dilation=np.int64(2), steps=torch.tensor(3))


@pytest.mark.parametrize("value", [4.0, "4", None, True, (4,)], ids=str)
def test_a_knob_that_is_no_integer_raises_by_name(value):
    message = re.escape(f"dilation must be an integer, not {type(value).__name__} {value!r}")
    with pytest.raises(TypeError, match=f"^{message}$"):
        check_integer(width=5, dilation=value)


@pytest.mark.parametrize("values", [[1, 0.5], np.array([1.0, 0.5]), torch.tensor([1.0, 0.5])])
def test_values_of_classes_become_a_float32_tensor(values):
    assert torch.equal(check_class_values(values, "weights"), torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (None, TypeError),
        ({1: 0.5}, TypeError),
        ("12", TypeError),
        ([[1.0], [1.0, 2.0]], TypeError),
        ([[1.0]], ValueError),
        ([1.0, -1.0], ValueError),
        ([1.0, math.nan], ValueError),
    ],
)
def test_other_values_of_classes_raise_by_name(values, error):
    with pytest.raises(error, match=r"^class_counts must be one (finite )?number (>= 0 )?per class, got "):
        check_class_values(values, "class_counts")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_reduction_is_returned(reduction):
    assert check_reduction(reduction) == reduction


@pytest.mark.parametrize("reduction", ["batchmean", "", None, True])
def test_another_reduction_raises(reduction):
    message = f'reduction must be "none", "sum" or "mean", not {reduction!r}'
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_reduction(reduction)
