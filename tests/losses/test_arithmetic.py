"""`maskloss.losses.arithmetic`."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision.ops
from torch import Tensor

from maskloss.losses.arithmetic import (
    at_least_float32,
    binary_cross_entropy,
    power,
    probabilities,
    reduced,
    sigmoid_focal,
)
from tests import reference


def gradient(values: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), leaf)[0]


# power


@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.5])
def test_power_by_hand_with_a_gradient_of_zero_at_zero(exponent):
    base = torch.tensor([0.0, 4.0], dtype=torch.float64, requires_grad=True)
    values = power(base, exponent)
    assert values.tolist() == pytest.approx([0.0**exponent, 4.0**exponent])
    assert gradient(values, base).tolist() == pytest.approx([0.0, exponent * 4.0 ** (exponent - 1)])


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_a_base_that_rounding_has_made_negative_counts_as_zero(exponent):
    base = torch.tensor([-1e-7], requires_grad=True)
    values = power(base, exponent)
    assert values.item() == 0
    assert gradient(values, base).item() == 0


# sigmoid_focal


@pytest.mark.parametrize(("alpha", "gamma"), [(None, 2.0), (0.25, 0.5), (0.9, 0.0)])
def test_focal_of_soft_targets_agrees_with_a_loop(generator, alpha, gamma):
    logits = 2 * torch.randn(20, generator=generator, dtype=torch.float64)
    targets = torch.rand(20, generator=generator, dtype=torch.float64)
    expected = []
    for logit, t in zip(logits.tolist(), targets.tolist(), strict=True):
        p = reference.sigmoid(logit)
        weight = 1 if alpha is None else alpha * t + (1 - alpha) * (1 - t)
        missed = 1 - (p * t + (1 - p) * (1 - t))
        expected.append(-weight * missed**gamma * (t * math.log(p) + (1 - t) * math.log(1 - p)))
    torch.testing.assert_close(sigmoid_focal(logits, targets, alpha, gamma).tolist(), expected)


def test_focal_is_torchvisions_but_with_a_finite_gradient_where_nothing_is_wrong(generator):
    logits = torch.randn(20, generator=generator)
    targets = (torch.rand(20, generator=generator) < 0.5).float()
    expected = torchvision.ops.sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0)
    torch.testing.assert_close(sigmoid_focal(logits, targets, 0.25, 2.0), expected)
    certain = torch.tensor([200.0], requires_grad=True)
    ours = sigmoid_focal(certain, torch.ones(1), 0.25, 0.5)
    theirs = torchvision.ops.sigmoid_focal_loss(certain, torch.ones(1), alpha=0.25, gamma=0.5)
    assert gradient(ours, certain).item() == 0
    assert gradient(theirs, certain).isnan()


# binary_cross_entropy


def test_cross_entropy_is_torchs_with_an_exact_gradient_far_from_zero(generator):
    logits = 3 * torch.randn(20, generator=generator)
    targets = torch.rand(20, generator=generator)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    torch.testing.assert_close(binary_cross_entropy(logits, targets), expected)
    # Of a target of 1 the slope is p - 1 = -sigmoid(-20), about -e^-20.
    logit = torch.tensor([20.0], requires_grad=True)
    slope = gradient(binary_cross_entropy(logit, torch.ones(1)), logit).item()
    assert slope == pytest.approx(-reference.sigmoid(-20.0), rel=1e-6)


# probabilities


@pytest.mark.parametrize("logit", [-30.0, -12.0, -1.0, 0.0, 1.0, 12.0, 30.0])
def test_both_probabilities_and_their_slopes_are_exact_in_float32(logit):
    logits = torch.tensor([logit], requires_grad=True)
    p, q = probabilities(logits)
    expected, rest = reference.sigmoid(logit), reference.sigmoid(-logit)
    assert p.item() == pytest.approx(expected, rel=1e-6)
    assert q.item() == pytest.approx(rest, rel=1e-6)
    (slope,) = torch.autograd.grad(p.sum(), logits, retain_graph=True)
    assert slope.item() == pytest.approx(expected * rest, rel=1e-6)
    assert gradient(q, logits).item() == pytest.approx(-expected * rest, rel=1e-6)


# at_least_float32 and reduced


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.bool, torch.int64, torch.float32])
def test_other_dtypes_become_float32_with_the_same_values(dtype):
    converted = at_least_float32(torch.tensor([0, 1]).to(dtype))
    assert converted.dtype == torch.float32
    assert converted.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_and_float64_are_not_copied(dtype):
    values = torch.zeros(2, dtype=dtype)
    assert at_least_float32(values) is values


def test_reductions_by_hand():
    values = torch.tensor([1.0, 2.0, 6.0])
    assert reduced(values, "none") is values
    assert reduced(values, "sum").item() == 9
    assert reduced(values, "mean").item() == 3
    with pytest.raises(ValueError, match="reduction must be"):
        reduced(values, "average")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_reduction_of_no_values_is_zero_with_a_gradient(reduction):
    values = torch.zeros(0, requires_grad=True)
    value = reduced(2 * values, reduction).sum()
    assert value == 0
    assert gradient(value, values).shape == (0,)
