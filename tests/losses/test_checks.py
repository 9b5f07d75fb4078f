"""`maskloss.losses.checks`."""

from __future__ import annotations

import math
import re

import pytest
import torch

from maskloss.losses.checks import check_in_range, check_positive, check_reduction, check_same_shape


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


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_reduction_is_returned(reduction):
    assert check_reduction(reduction) == reduction


@pytest.mark.parametrize("reduction", ["batchmean", "", None, True])
def test_another_reduction_raises(reduction):
    message = f'reduction must be "none", "sum" or "mean", not {reduction!r}'
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_reduction(reduction)
