"""`maskloss.losses.combination`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from maskloss import MaskRCNNLoss
from maskloss.losses import (
    ClassAgnosticMaskLoss,
    ClassFocalLoss,
    ClassWeightedCrossEntropyLoss,
    MaskBCELoss,
    MaskDiceLoss,
    MaskSoftmaxLoss,
    SeesawLoss,
    WeightedSum,
    mask_bce_loss,
    mask_dice_loss,
    mask_focal_loss,
)


def test_a_sum_is_the_weighted_sum_of_modules_and_functions(generator):
    logits, targets = torch.randn(2, 3, 4, 4, generator=generator)
    targets = targets.sigmoid()
    loss = WeightedSum([MaskBCELoss(), mask_dice_loss, mask_focal_loss], weights=[1.0, 0.5, 3.0])
    expected = (
        mask_bce_loss(logits, targets)
        + 0.5 * mask_dice_loss(logits, targets)
        + 3.0 * mask_focal_loss(logits, targets)
    )
    torch.testing.assert_close(loss(logits, targets), expected)
    assert "weights=(1.0, 0.5, 3.0)" in repr(loss)
    plain = WeightedSum([MaskBCELoss(), MaskDiceLoss()])
    torch.testing.assert_close(
        plain(logits, targets), mask_bce_loss(logits, targets) + mask_dice_loss(logits, targets)
    )


def test_it_is_a_term_and_its_parts_move_save_and_copy_with_it():
    loss = MaskRCNNLoss(classification=WeightedSum([SeesawLoss(4), nn.CrossEntropyLoss(reduction="none")]))
    assert [key for key in loss.state_dict() if key.endswith("class_counts")]
    twin = copy.deepcopy(loss)
    twin.classification(torch.zeros(2, 4, requires_grad=True), torch.tensor([1, 2]))
    assert twin.state_dict() != {}
    counts = [module.classification.terms[0].class_counts.sum().item() for module in (loss, twin)]
    assert counts == [0, 2]
    assert twin.classification.terms[0] is twin.classification.registered[0]
    moved = WeightedSum([SeesawLoss(4)]).to("meta")
    assert moved.terms[0].class_counts.device.type == "meta"


def test_a_sum_of_terms_of_all_classes_is_one_too():
    class AllClasses:
        all_classes = True

        def __call__(self, mask_logits, mask_targets, labels):
            return mask_logits[:, 0].mean(dim=(1, 2))

    loss = WeightedSum([AllClasses(), AllClasses()], weights=[1.0, 2.0])
    assert MaskRCNNLoss(mask=loss).needs_all_mask_classes
    mask_logits = torch.arange(12.0).reshape(1, 3, 2, 2)
    assert loss(mask_logits, torch.zeros(1, 2, 2), torch.tensor([2])).tolist() == [3 * 1.5]
    assert not MaskRCNNLoss(mask=WeightedSum([MaskBCELoss()])).needs_all_mask_classes


@pytest.mark.parametrize(
    ("terms", "weights", "message"),
    [
        ([], None, "at least one"),
        ([MaskBCELoss()], [1.0, 2.0], "1 terms and 2 weights"),
        ([MaskBCELoss()], [-1.0], r"weights\[0\]"),
        ([MaskBCELoss()], [float("inf")], r"weights\[0\]"),
        ([MaskBCELoss(), MaskSoftmaxLoss()], None, "take different arguments"),
        ([MaskSoftmaxLoss()], None, "mask_probs"),
        ([ClassAgnosticMaskLoss(MaskBCELoss())], None, "mask_probs"),
    ],
)
def test_terms_that_cannot_be_added_raise(terms, weights, message):
    with pytest.raises(ValueError, match=message):
        WeightedSum(terms, weights=weights)


def test_values_of_different_shapes_raise(generator):
    loss = WeightedSum([MaskBCELoss(), lambda logits, targets: mask_dice_loss(logits, targets).sum()])
    with pytest.raises(ValueError, match="shapes differ"):
        loss(torch.zeros(3, 2, 2), torch.zeros(3, 2, 2))


def test_a_term_that_also_returns_weights_raises_by_its_index():
    loss = WeightedSum([ClassFocalLoss(), ClassWeightedCrossEntropyLoss([1.0, 2.0])])
    with pytest.raises(TypeError, match="term 1 of the sum must return a tensor, not tuple"):
        loss(torch.zeros(3, 2), torch.tensor([0, 1, 1]))


def test_the_term_of_a_class_agnostic_loss_may_be_a_sum(generator):
    inner = WeightedSum([MaskBCELoss(), MaskDiceLoss()])
    logits, targets = torch.randn(3, 5, 4, 4, generator=generator), torch.ones(3, 4, 4)
    found = ClassAgnosticMaskLoss(inner)(logits, targets, torch.tensor([1, 2, 3]))
    torch.testing.assert_close(found, inner(logits[:, 0], targets))
