"""`maskloss.losses.mask_overlap` against MONAI, segmentation-models-pytorch and values worked out by hand."""

from __future__ import annotations

import math
import warnings
from types import ModuleType

import pytest
import torch
from torch import Tensor

from maskloss import losses
from maskloss.losses import (
    mask_background_dice_loss,
    mask_dice_loss,
    mask_generalized_dice_loss,
    mask_lovasz_loss,
    mask_tversky_loss,
    mask_weighted_dice_loss,
)


@pytest.fixture
def monai() -> ModuleType:
    return import_quietly("monai.losses")


@pytest.fixture
def smp() -> ModuleType:
    return import_quietly("segmentation_models_pytorch.losses")


def import_quietly(name: str) -> ModuleType:
    with warnings.catch_warnings():
        # Warnings on import come from these libraries and their dependencies.
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.fixture
def logits(generator) -> Tensor:
    return 2 * torch.randn(5, 8, 8, generator=generator, dtype=torch.float64)


@pytest.fixture
def targets(generator) -> Tensor:
    return (torch.rand(5, 8, 8, generator=generator) < 0.3).double()


def images(values: Tensor) -> Tensor:
    """(P, M, M) as MONAI's (batch, channel, height, width)."""
    return values[:, None]


# Dice


def test_dice_by_hand():
    # p = 1/2 everywhere in four cells, of which one is of the object: 1 - (2 · 1/2 + 1) / (2 + 1 + 1) = 1/2.
    targets = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert mask_dice_loss(torch.zeros(1, 2, 2), targets).item() == pytest.approx(1 / 2)
    # Of the background: 1 - (2 · 3/2 + 1) / (2 + 3 + 1) = 1/3.
    assert mask_background_dice_loss(torch.zeros(1, 2, 2), targets).item() == pytest.approx(1 / 3)
    # With α = 2 and β = 1/2: Σ w p t = 1, Σ w (p + t) = 2 · 3/2 + 3 · 1/4: 1 - 3 / 4.75.
    value = mask_weighted_dice_loss(torch.zeros(1, 2, 2), targets, positive_weight=2.0, negative_weight=0.5)
    assert value.item() == pytest.approx(1 - 3 / 4.75)


@pytest.mark.parametrize("smooth", [1e-3, 1.0, 20.0])
def test_dice_is_monais(monai, logits, targets, smooth):
    theirs = monai.DiceLoss(sigmoid=True, smooth_nr=smooth, smooth_dr=smooth, reduction="none")
    expected = theirs(images(logits), images(targets)).flatten()
    torch.testing.assert_close(mask_dice_loss(logits, targets, smooth=smooth), expected)
    expected = theirs(images(-logits), images(1 - targets)).flatten()
    torch.testing.assert_close(mask_background_dice_loss(logits, targets, smooth=smooth), expected)


def test_dice_is_smps(smp, logits, targets):
    # Theirs adds its smoothing to half of both sums.
    theirs = smp.DiceLoss(mode="binary", smooth=1.0)
    expected = torch.stack(
        [theirs(z[None, None], t[None, None]) for z, t in zip(logits, targets, strict=True)]
    )
    torch.testing.assert_close(mask_dice_loss(logits, targets, smooth=2.0), expected)


def test_dice_with_equal_weights_is_dice(logits, targets):
    weighted = mask_weighted_dice_loss(logits, targets, positive_weight=1.0, negative_weight=1.0)
    torch.testing.assert_close(weighted, mask_dice_loss(logits, targets))


def test_a_low_negative_weight_makes_false_positives_cheaper():
    targets = torch.zeros(1, 4, 4)
    targets[:, 1:3, 1:3] = 1.0
    too_much = torch.full((1, 4, 4), 20.0)

    def loss(negative_weight: float) -> float:
        return mask_weighted_dice_loss(
            too_much, targets, positive_weight=1.0, negative_weight=negative_weight
        ).item()

    assert loss(0.1) < loss(1.0) < loss(3.0)


@pytest.mark.parametrize("loss", [mask_dice_loss, mask_background_dice_loss, mask_generalized_dice_loss])
def test_perfect_and_worst_predictions_are_the_ends_of_the_range(loss, targets):
    right = 200 * targets - 100
    torch.testing.assert_close(loss(right, targets), torch.zeros(5, dtype=torch.float64))
    worst = loss(-right, targets)
    assert (worst > 0.9).all()
    assert (worst <= 1).all()


@pytest.mark.parametrize("loss", [mask_dice_loss, mask_tversky_loss])
def test_an_empty_prediction_of_an_empty_target_costs_nothing(loss):
    assert loss(torch.full((1, 4, 4), -100.0), torch.zeros(1, 4, 4)).item() == 0


def test_generalized_dice_is_monais(monai, logits, targets):
    theirs = monai.GeneralizedDiceLoss(w_type="square", smooth_nr=0.0, smooth_dr=0.0, reduction="none")
    p = logits.sigmoid()
    expected = theirs(torch.stack([1 - p, p], dim=1), torch.stack([1 - targets, targets], dim=1)).flatten()
    torch.testing.assert_close(mask_generalized_dice_loss(logits, targets), expected)


def test_generalized_dice_without_an_object_is_finite_and_falls_with_the_prediction():
    nothing = torch.zeros(1, 4, 4)
    losses = [
        mask_generalized_dice_loss(torch.full((1, 4, 4), z), nothing).item() for z in (5.0, 0.0, -5.0, -50.0)
    ]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0, abs=1e-6)


# Tversky


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.7), (0.5, 0.5), (1.0, 0.0)])
def test_tversky_is_monais(monai, logits, targets, alpha, beta):
    theirs = monai.TverskyLoss(
        sigmoid=True, alpha=alpha, beta=beta, smooth_nr=1.0, smooth_dr=1.0, reduction="none"
    )
    expected = theirs(images(logits), images(targets)).flatten()
    torch.testing.assert_close(mask_tversky_loss(logits, targets, alpha=alpha, beta=beta), expected)


def test_focal_tversky_is_smps(smp, logits, targets):
    theirs = smp.TverskyLoss(mode="binary", alpha=0.3, beta=0.7, gamma=0.75, smooth=1.0)
    expected = torch.stack(
        [theirs(images(z[None]), images(t[None])) for z, t in zip(logits, targets, strict=True)]
    )
    torch.testing.assert_close(mask_tversky_loss(logits, targets, gamma=0.75), expected)


def test_with_equal_prices_tversky_is_dice_and_with_full_ones_iou(logits, targets):
    torch.testing.assert_close(
        mask_tversky_loss(logits, targets, alpha=0.5, beta=0.5, smooth=0.5),
        mask_dice_loss(logits, targets, smooth=1.0),
    )
    hard = torch.where(logits > 0, 100.0, -100.0).double()
    predicted, wanted = logits > 0, targets > 0.5
    iou = (predicted & wanted).sum((1, 2)) / (predicted | wanted).sum((1, 2))
    found = mask_tversky_loss(hard, targets, alpha=1.0, beta=1.0, smooth=1e-9)
    torch.testing.assert_close(found, 1 - iou.double())


# Lovász


def test_lovasz_is_smps(smp, logits, targets):
    theirs = smp.LovaszLoss(mode="binary", per_image=True)
    logits, targets = logits.float(), targets.float()
    expected = torch.stack([theirs(z[None], t[None]) for z, t in zip(logits, targets, strict=True)])
    torch.testing.assert_close(mask_lovasz_loss(logits, targets), expected)


def test_lovasz_is_a_loop_over_its_definition(logits, targets, tolerance):
    expected = []
    for z, t in zip(logits.flatten(1).tolist(), targets.flatten(1).tolist(), strict=True):
        errors = [1 - (logit if wanted else -logit) for logit, wanted in zip(z, t, strict=True)]
        wanted = {pixel for pixel, target in enumerate(t) if target}
        total, before, mask = 0.0, 0.0, wanted
        for pixel in sorted(range(len(z)), key=lambda pixel: -errors[pixel]):
            mask = mask ^ {pixel}  # wrong in one more pixel
            delta = 1 - len(mask & wanted) / len(mask | wanted)
            total, before = total + max(errors[pixel], 0) * (delta - before), delta
        expected.append(total)
    torch.testing.assert_close(
        mask_lovasz_loss(logits, targets).tolist(), expected, **tolerance[torch.float64]
    )


def test_lovasz_of_hard_errors_is_one_minus_iou():
    # With all margins ±1 wrong pixels have an error of 2 and right ones of 0, and the hinge is 2 (1 - IoU).
    generator = torch.Generator().manual_seed(3)
    predicted, wanted = torch.rand(2, 6, 5, 5, generator=generator) < 0.4
    logits = torch.where(predicted, 1.0, -1.0)
    iou = (predicted & wanted).sum((1, 2)) / (predicted | wanted).sum((1, 2))
    torch.testing.assert_close(mask_lovasz_loss(logits, wanted), 2 * (1 - iou))


def test_lovasz_is_nothing_past_the_margin_and_reads_soft_targets_at_a_half():
    soft = torch.tensor([[[0.9, 0.5], [0.49, 0.0]]])
    assert mask_lovasz_loss(torch.tensor([[[1.0, 5.0], [-1.0, -2.0]]]), soft).item() == 0
    assert mask_lovasz_loss(torch.tensor([[[1.0, -1.0], [-1.0, -2.0]]]), soft).item() > 0


def test_the_focal_tversky_loss_is_exact_down_to_a_perfect_mask():
    """1 - TI = 0.7 · 784 q / (784 (1 - q) + 0.7 · 784 q + 1) with q = σ(-x), in float64."""
    for x, gamma in ((5.0, 0.5), (15.0, 0.5), (15.0, 0.75), (15.0, 2.0), (25.0, 0.5)):
        q = 1 / (1 + math.exp(x))
        share = 0.7 * 784 * q / (784 * (1 - q) + 0.7 * 784 * q + 1)
        logits = torch.full((1, 28, 28), x, requires_grad=True)
        found = losses.mask_tversky_loss(logits, torch.ones(1, 28, 28), gamma=gamma)
        found.sum().backward()
        assert found.item() == pytest.approx(share**gamma, rel=1e-4)
        assert (logits.grad < 0).all()


def test_a_perfect_mask_has_no_focal_tversky_loss_and_a_finite_gradient():
    logits = torch.full((1, 4, 4), 200.0, requires_grad=True)
    found = losses.mask_tversky_loss(logits, torch.ones(1, 4, 4), gamma=0.5)
    found.sum().backward()
    assert found.item() == 0
    assert logits.grad.isfinite().all()
