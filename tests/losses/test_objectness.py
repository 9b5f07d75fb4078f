"""`maskloss.losses.objectness`; what all losses have in common is in `test_contract`."""

from __future__ import annotations

import math

import pytest
import torch

from maskloss.losses import objectness_focal_loss, quality_focal_loss


def test_objectness_focal_by_hand():
    # An object at p = 3/4: 0.3 · (1/4)² · -ln 3/4. Background at p = 3/4: 0.7 · (3/4)² · -ln 1/4.
    logits = torch.full((2,), math.log(3))
    found = objectness_focal_loss(logits, torch.tensor([1.0, 0.0]), alpha=0.3)
    expected = [-0.3 / 16 * math.log(3 / 4), -0.7 * 9 / 16 * math.log(1 / 4)]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (None, 1.0)])
def test_objectness_focal_is_kornias(generator, alpha, gamma):
    kornia = pytest.importorskip("kornia.losses", reason="kornia is not installed")
    logits = 2 * torch.randn(9, generator=generator, dtype=torch.float64)
    labels = (torch.rand(9, generator=generator) < 0.4).double()
    expected = kornia.binary_focal_loss_with_logits(
        logits[:, None], labels[:, None], alpha=alpha, gamma=gamma, reduction="none"
    )[:, 0]
    found = objectness_focal_loss(logits, labels, alpha=alpha, gamma=gamma)
    torch.testing.assert_close(found, expected)


def test_quality_focal_by_hand_and_at_its_best():
    # σ = 1/2 against y = 3/4: (1/4)² ln 2.
    value = quality_focal_loss(torch.zeros(1), torch.tensor([0.75]))
    assert value.item() == pytest.approx(math.log(2) / 16)
    assert quality_focal_loss(torch.tensor([0.75]).logit(), torch.tensor([0.75])).item() == pytest.approx(0)


def test_quality_focal_of_hard_labels_is_focal_without_alpha(generator):
    logits = torch.randn(9, generator=generator)
    labels = (torch.rand(9, generator=generator) < 0.4).float()
    torch.testing.assert_close(
        quality_focal_loss(logits, labels, beta=2.0),
        objectness_focal_loss(logits, labels, alpha=None, gamma=2.0),
    )
