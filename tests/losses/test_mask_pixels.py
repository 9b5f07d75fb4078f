"""`maskloss.losses.mask_pixels`."""

import math

import pytest
import torch
import torch.nn.functional as F

from maskloss.losses import (
    MaskBCELoss,
    mask_bce_loss,
    mask_boundary_bce_loss,
    mask_focal_loss,
    mask_weighted_bce_loss,
)
from tests import reference

# mask_bce_loss


def test_value_by_hand():
    # p = 3/4 and 1/2 against t = 1 and 0: -(log 3/4 + log 1/2) / 2. The second RoI's soft target 1/2 at
    # p = 1/4 costs -(log 1/4 + log 3/4) / 2 a cell.
    mask_logits = torch.tensor([[[math.log(3), 0.0]], [[-math.log(3), -math.log(3)]]])
    mask_targets = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    expected = [-(math.log(3 / 4) + math.log(1 / 2)) / 2, -(math.log(1 / 4) + math.log(3 / 4)) / 2]
    assert mask_bce_loss(mask_logits, mask_targets).tolist() == pytest.approx(expected, rel=1e-6)


def test_agrees_with_the_reference_on_soft_targets(generator, tolerance):
    mask_logits = 3 * torch.randn(6, 4, 4, generator=generator, dtype=torch.float64)
    mask_targets = torch.rand(6, 4, 4, generator=generator, dtype=torch.float64)
    values = mask_bce_loss(mask_logits, mask_targets)
    expected = reference.mask_bce(mask_logits, mask_targets)
    torch.testing.assert_close(values.tolist(), expected, **tolerance[torch.float64])


def test_a_perfect_prediction_costs_nothing_and_the_worst_its_logit():
    mask_targets = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    right = 200 * mask_targets - 100
    torch.testing.assert_close(mask_bce_loss(right, mask_targets), torch.zeros(1))
    torch.testing.assert_close(mask_bce_loss(-right, mask_targets), torch.full((1,), 100.0))


def test_the_best_logits_for_soft_targets_cost_their_entropy():
    soft = torch.tensor([[[0.25, 0.25], [0.25, 0.25]]], dtype=torch.float64)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    at_best = mask_bce_loss(soft.logit(), soft)
    assert at_best.item() == pytest.approx(entropy, rel=1e-12)
    assert mask_bce_loss(soft.logit() + 0.1, soft) > at_best
    assert mask_bce_loss(soft.logit() - 0.1, soft) > at_best


def test_permuting_rois_permutes_values(generator):
    mask_logits, mask_targets = torch.randn(2, 5, 3, 3, generator=generator)
    mask_targets = mask_targets.sigmoid()
    order = torch.randperm(5, generator=generator)
    torch.testing.assert_close(
        mask_bce_loss(mask_logits[order], mask_targets[order]),
        mask_bce_loss(mask_logits, mask_targets)[order],
    )


def test_gradient_is_probability_minus_target_over_the_cells(generator):
    mask_logits = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    mask_targets = torch.rand(2, 3, 3, generator=generator, dtype=torch.float64)
    mask_bce_loss(mask_logits, mask_targets).sum().backward()
    torch.testing.assert_close(mask_logits.grad, (mask_logits.detach().sigmoid() - mask_targets) / 9)


def test_gradcheck(generator):
    mask_logits = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    mask_targets = torch.rand(2, 3, 3, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logits: mask_bce_loss(logits, mask_targets), mask_logits)


def test_values_and_gradients_are_finite_at_extreme_logits():
    mask_logits = torch.tensor([[[1e4, -1e4], [1e4, -1e4]]], requires_grad=True)
    value = mask_bce_loss(mask_logits, torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))
    value.sum().backward()
    assert value.item() == 5000  # two cells of four cost 1e4
    assert mask_logits.grad.tolist() == [[[0.25, -0.25], [0, 0]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(generator, tolerance, dtype):
    mask_logits = 5 * torch.randn(4, 3, 3, generator=generator)
    mask_targets = torch.rand(4, 3, 3, generator=generator)
    values = mask_bce_loss(mask_logits.to(dtype), mask_targets)
    assert values.dtype == torch.float32
    # Only the rounding of the logits is lost ...
    torch.testing.assert_close(values, mask_bce_loss(mask_logits, mask_targets), **tolerance[dtype])
    # ... and nothing of the arithmetic.
    torch.testing.assert_close(
        values, mask_bce_loss(mask_logits.to(dtype).float(), mask_targets), rtol=0, atol=0
    )


def test_float64_stays_float64():
    assert (
        mask_bce_loss(torch.zeros(1, 2, 2, dtype=torch.float64), torch.ones(1, 2, 2)).dtype == torch.float64
    )


def test_bool_targets_are_taken():
    mask_targets = torch.tensor([[[True, False], [False, True]]])
    mask_logits = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    torch.testing.assert_close(
        mask_bce_loss(mask_logits, mask_targets),
        mask_bce_loss(mask_logits, mask_targets.float()),
        rtol=0,
        atol=0,
    )


def test_sum_and_mean_reduce_the_values(generator):
    mask_logits = torch.randn(3, 2, 2, generator=generator)
    mask_targets = torch.ones(3, 2, 2)
    values = mask_bce_loss(mask_logits, mask_targets)
    torch.testing.assert_close(mask_bce_loss(mask_logits, mask_targets, reduction="sum"), values.sum())
    torch.testing.assert_close(mask_bce_loss(mask_logits, mask_targets, reduction="mean"), values.mean())


@pytest.mark.parametrize(("reduction", "shape"), [("none", (0,)), ("sum", ()), ("mean", ())])
def test_no_rois_give_zero_with_a_gradient(reduction, shape):
    mask_logits = torch.zeros(0, 28, 28, requires_grad=True)
    value = mask_bce_loss(mask_logits, torch.zeros(0, 28, 28), reduction=reduction)
    value.sum().backward()
    assert value.shape == shape
    assert value.sum() == 0
    assert mask_logits.grad.shape == (0, 28, 28)


def test_different_shapes_raise_and_do_not_broadcast():
    with pytest.raises(ValueError, match=r"mask_logits \(2, 3, 3\), mask_targets \(1, 3, 3\)"):
        mask_bce_loss(torch.zeros(2, 3, 3), torch.zeros(1, 3, 3))


def test_an_unknown_reduction_raises():
    with pytest.raises(ValueError, match="not 'batchmean'"):
        mask_bce_loss(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), reduction="batchmean")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_module_equals_function(generator, reduction):
    mask_logits, mask_targets = torch.randn(3, 2, 2, generator=generator), torch.ones(3, 2, 2)
    torch.testing.assert_close(
        MaskBCELoss(reduction=reduction)(mask_logits, mask_targets),
        mask_bce_loss(mask_logits, mask_targets, reduction=reduction),
        rtol=0,
        atol=0,
    )


# mask_weighted_bce_loss


def test_weighted_bce_by_hand():
    # α = 3 on p = 3/4 of a positive pixel, β = 1/2 on p = 3/4 of a negative one.
    mask_logits = torch.full((1, 1, 2), math.log(3))
    value = mask_weighted_bce_loss(
        mask_logits, torch.tensor([[[1.0, 0.0]]]), positive_weight=3.0, negative_weight=0.5
    )
    assert value.item() == pytest.approx(-(3 * math.log(3 / 4) + 0.5 * math.log(1 / 4)) / 2)


def test_weighted_bce_is_torchs_pos_weight_times_beta(generator):
    mask_logits = torch.randn(3, 4, 4, generator=generator)
    mask_targets = torch.rand(3, 4, 4, generator=generator)
    expected = 0.4 * F.binary_cross_entropy_with_logits(
        mask_logits, mask_targets, pos_weight=torch.tensor(2.0 / 0.4), reduction="none"
    ).mean((1, 2))
    found = mask_weighted_bce_loss(mask_logits, mask_targets, positive_weight=2.0, negative_weight=0.4)
    torch.testing.assert_close(found, expected)
    even = mask_weighted_bce_loss(mask_logits, mask_targets, positive_weight=1.0, negative_weight=1.0)
    torch.testing.assert_close(even, mask_bce_loss(mask_logits, mask_targets))


# mask_focal_loss


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.7, 0.5), (None, 2.0)])
def test_focal_is_kornias(generator, alpha, gamma):
    kornia = pytest.importorskip("kornia.losses", reason="kornia is not installed")
    mask_logits = 2 * torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    mask_targets = (torch.rand(3, 4, 4, generator=generator) < 0.4).double()
    per_pixel = kornia.binary_focal_loss_with_logits(
        mask_logits[:, None], mask_targets[:, None], alpha=alpha, gamma=gamma, reduction="none"
    )
    found = mask_focal_loss(mask_logits, mask_targets, alpha=alpha, gamma=gamma)
    torch.testing.assert_close(found, per_pixel.mean((1, 2, 3)))


def test_focal_without_focus_is_cross_entropy(generator):
    mask_logits = torch.randn(3, 4, 4, generator=generator)
    mask_targets = torch.rand(3, 4, 4, generator=generator)
    torch.testing.assert_close(
        mask_focal_loss(mask_logits, mask_targets, alpha=None, gamma=0.0),
        mask_bce_loss(mask_logits, mask_targets),
    )


# mask_boundary_bce_loss


@pytest.mark.parametrize(("boundary_weight", "width"), [(5.0, 3), (2.0, 5), (5.0, 31)])
def test_boundary_bce_agrees_with_the_reference(generator, boundary_weight, width):
    mask_logits = 2 * torch.randn(3, 6, 7, generator=generator, dtype=torch.float64)
    mask_targets = torch.rand(3, 6, 7, generator=generator, dtype=torch.float64)
    found = mask_boundary_bce_loss(mask_logits, mask_targets, boundary_weight=boundary_weight, width=width)
    expected = reference.boundary_bce(mask_logits, mask_targets, boundary_weight, width)
    torch.testing.assert_close(found.tolist(), expected)


def test_boundary_bce_without_weight_or_boundary_is_cross_entropy(generator):
    mask_logits = torch.randn(3, 6, 6, generator=generator)
    mask_targets = torch.rand(3, 6, 6, generator=generator)
    torch.testing.assert_close(
        mask_boundary_bce_loss(mask_logits, mask_targets, boundary_weight=0.0),
        mask_bce_loss(mask_logits, mask_targets),
    )
    whole = torch.ones(3, 6, 6)  # an object that the RoI cuts off on every side has no boundary in it
    torch.testing.assert_close(mask_boundary_bce_loss(mask_logits, whole), mask_bce_loss(mask_logits, whole))


def test_a_mistake_at_the_boundary_costs_more_than_one_inside():
    mask_targets = torch.zeros(1, 9, 9)
    mask_targets[:, :, 5:] = 1.0
    right = 20 * mask_targets - 10
    at_boundary, inside = right.clone(), right.clone()
    at_boundary[0, 4, 5] *= -1
    inside[0, 4, 8] *= -1
    assert mask_boundary_bce_loss(at_boundary, mask_targets) > 2 * mask_boundary_bce_loss(
        inside, mask_targets
    )
