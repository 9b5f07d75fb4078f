"""MaskBySupervision: each positive gets the loss for its label; and the criterion calls mask terms by what they use."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from maskloss import MaskRCNNLoss
from maskloss.losses import (
    ClassAgnosticMaskLoss,
    MaskBCELoss,
    MaskBoxLoss,
    MaskBySupervision,
    MaskDiceLoss,
    MaskLabels,
    MaskPairwiseLoss,
    MaskPointLoss,
    MaskProjectionLoss,
    MaskSoftmaxLoss,
    Supervision,
    WeightedSum,
    mask_bce_loss,
    mask_box_loss,
    mask_point_loss,
    mask_projection_loss,
)
from maskloss.losses.normalizers import BatchCounts
from maskloss.losses.terms import MaskBatch

P, K, M = 7, 3, 5
ROWS = {
    Supervision.MASK: torch.tensor([4, 0]),
    Supervision.POINTS: torch.tensor([1, 5, 6]),
    Supervision.BOX: torch.tensor([3, 2]),
}
COUNTS = BatchCounts(num_images=1, sampled=20, positives=P, batch_size_per_image=512)


@pytest.fixture
def labels(generator: torch.Generator) -> MaskLabels:
    return MaskLabels(
        mask_targets=torch.rand(P, M, M, generator=generator),
        rows=ROWS,
        gt_box_grids=torch.rand(P, M, M, generator=generator),
        point_coords=torch.rand(P, K, 2, generator=generator),
        point_labels=torch.randint(-1, 2, (P, K), generator=generator).float(),
        image_crops=0.1 * torch.rand(P, 3, M, M, generator=generator),
    )


@pytest.fixture
def logits(generator: torch.Generator) -> Tensor:
    return torch.randn(P, M, M, generator=generator, requires_grad=True)


@pytest.mark.parametrize("boxes", [MaskBoxLoss(), MaskProjectionLoss()], ids=["image", "projection"])
def test_each_positive_gets_the_loss_of_its_label(boxes, labels, logits):
    values = MaskBySupervision(boxes=boxes)(logits, labels)
    assert values.shape == (P,)
    for row in range(P):
        here = slice(row, row + 1)
        if row in (4, 0):
            expected = mask_bce_loss(logits[here], labels.mask_targets[here])
        elif row in (1, 5, 6):
            expected = mask_point_loss(logits[here], labels.point_coords[here], labels.point_labels[here])
        elif isinstance(boxes, MaskBoxLoss):
            expected = mask_box_loss(logits[here], labels.image_crops[here], labels.gt_box_grids[here])
        else:
            expected = mask_projection_loss(logits[here], labels.gt_box_grids[here])
        torch.testing.assert_close(values[row], expected[0])
        (found,) = torch.autograd.grad(values[row], logits, retain_graph=True)
        assert found[row].any()
        assert not found[torch.arange(P) != row].any()


def test_values_per_cell_are_averaged(labels, logits):
    per_cell = MaskBySupervision(
        mask=lambda logits, targets: (logits.sigmoid() - targets).abs(), boxes=MaskBoxLoss()
    )
    values = per_cell(logits, labels)
    expected = (logits[[4, 0]].sigmoid() - labels.mask_targets[[4, 0]]).abs().mean(dim=(1, 2))
    torch.testing.assert_close(values[[4, 0]], expected)


def test_the_criterion_divides_by_all_positives_and_weights_each(labels, logits):
    loss = MaskRCNNLoss(mask=MaskBySupervision(boxes=MaskBoxLoss()))
    weights = torch.arange(P, dtype=torch.float32)
    batch = MaskBatch(
        logits[:, None], labels.mask_targets, torch.ones(P, dtype=torch.int64), COUNTS, weights, labels
    )
    values = MaskBySupervision(boxes=MaskBoxLoss())(logits, labels)
    torch.testing.assert_close(loss.mask_losses(batch)["loss_mask"], (weights * values).sum() / P)


def test_a_batch_of_masks_needs_no_labels(logits, generator):
    targets = torch.rand(P, M, M, generator=generator)
    batch = MaskBatch(logits[:, None], targets, torch.ones(P, dtype=torch.int64), COUNTS)
    weak = MaskRCNNLoss(mask=MaskBySupervision(mask=MaskDiceLoss(), boxes=MaskBoxLoss())).mask_losses(batch)
    plain = MaskRCNNLoss(mask=MaskDiceLoss()).mask_losses(batch)
    torch.testing.assert_close(weak, plain)


def test_no_positives_give_zero_with_a_graph():
    logits = torch.zeros(0, M, M, requires_grad=True)
    loss = MaskRCNNLoss(mask=MaskBySupervision(boxes=MaskBoxLoss()))
    batch = MaskBatch(logits[:, None], torch.zeros(0, M, M), torch.zeros(0, dtype=torch.int64), COUNTS)
    value = loss.mask_losses(batch)["loss_mask"]
    value.backward()
    assert value == 0
    assert logits.grad is not None


def test_a_term_that_uses_the_image_needs_it(logits):
    class OfTheImage:
        uses_image = True

        def __call__(self, *arguments: Tensor) -> Tensor:
            return arguments[0].mean(dim=(1, 2))

    batch = MaskBatch(logits[:, None], logits.detach(), torch.ones(P, dtype=torch.int64), COUNTS)
    with pytest.raises(
        ValueError, match="the mask term has uses_image, but the MaskBatch has no image crops"
    ):
        MaskRCNNLoss(mask=OfTheImage()).mask_losses(batch)


def test_a_term_that_uses_the_image_is_no_term_for_masks_alone():
    class OfTheImage:
        uses_image = True

        def __call__(self, mask_logits: Tensor, mask_targets: Tensor, crops: Tensor, boxes: Tensor) -> Tensor:
            return mask_logits.mean(dim=(1, 2))

    for make in (ClassAgnosticMaskLoss, MaskBySupervision):
        with pytest.raises(TypeError, match=r"must take \(mask_logits, mask_targets\) and nothing else"):
            make(OfTheImage())


def test_supervision_follows_the_terms():
    assert MaskBySupervision().supervision == {Supervision.MASK, Supervision.POINTS}
    assert not MaskBySupervision().uses_image
    boxes = MaskBySupervision(mask=None, points=None, boxes=MaskProjectionLoss())
    assert boxes.supervision == {Supervision.BOX}
    assert not boxes.uses_image
    assert MaskRCNNLoss(mask=MaskBySupervision(boxes=MaskPairwiseLoss())).uses_image
    assert MaskRCNNLoss().mask_supervision == {Supervision.MASK}


def test_a_label_without_a_term_raises(labels, logits):
    with pytest.raises(ValueError, match="there is no term for objects whose best label is box"):
        MaskBySupervision()(logits, labels)


BAD: list[tuple[Any, type[Exception], str]] = [
    ({"mask": None, "points": None}, ValueError, "needs a term for masks, points or boxes"),
    ({"mask": MaskSoftmaxLoss()}, TypeError, "must take (mask_logits, mask_targets) and nothing else"),
    ({"mask": MaskBySupervision()}, TypeError, "must take (mask_logits, mask_targets) and nothing else"),
    ({"mask": MaskBCELoss}, TypeError, "is a class"),
    ({"boxes": MaskProjectionLoss}, TypeError, "boxes: MaskProjectionLoss is a class"),
    ({"points": "points"}, TypeError, "points: "),
    ({"boxes": MaskBoxLoss(reduction="sum")}, ValueError, 'boxes: MaskBoxLoss has reduction="sum"'),
]


@pytest.mark.parametrize(("terms", "error", "message"), BAD)
def test_what_is_no_term_is_refused(terms, error, message):
    with pytest.raises(error, match=re.escape(message)):
        MaskBySupervision(**terms)


@pytest.mark.parametrize("term", [MaskProjectionLoss(), MaskPairwiseLoss(), MaskBoxLoss()])
def test_a_weak_loss_alone_is_no_mask_term(term):
    with pytest.raises(TypeError, match=r"is for objects without a mask; write MaskBySupervision\("):
        MaskRCNNLoss(mask=term)


@pytest.mark.parametrize(
    "term",
    [mask_projection_loss, mask_box_loss, mask_point_loss, partial(mask_projection_loss, reduction="none")],
)
def test_a_weak_loss_as_a_function_is_no_mask_term_either(term):
    with pytest.raises(
        TypeError, match=r"mask_\w+_loss is for objects without a mask; write MaskBySupervision\("
    ):
        MaskRCNNLoss(mask=term)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (
            {"points": MaskDiceLoss()},
            "points: MaskDiceLoss cannot be called with mask_logits and point_coords and",
        ),
        (
            {"points": MaskProjectionLoss()},
            "points: MaskProjectionLoss cannot be called with mask_logits and",
        ),
        (
            {"boxes": MaskPointLoss()},
            "boxes: MaskPointLoss cannot be called with mask_logits and gt_box_grids$",
        ),
        (
            {"boxes": mask_box_loss},
            "boxes: mask_box_loss cannot be called with mask_logits and gt_box_grids$",
        ),
    ],
)
def test_terms_of_other_arguments_are_refused(terms, message):
    with pytest.raises(TypeError, match=message):
        MaskBySupervision(**terms)


def test_terms_of_all_labels_are_no_parts_of_others():
    with pytest.raises(TypeError, match="of one channel must take"):
        ClassAgnosticMaskLoss(MaskBySupervision())
    with pytest.raises(ValueError, match="a MaskBySupervision cannot be part of a sum"):
        WeightedSum([MaskBCELoss(), MaskBySupervision()])
    with pytest.raises(ValueError, match="uses_image = True and one without"):
        WeightedSum([MaskProjectionLoss(), MaskBoxLoss()])
    assert MaskBySupervision(boxes=WeightedSum([MaskBoxLoss(), MaskPairwiseLoss()])).uses_image


def test_parameters_of_the_terms_are_the_losss():
    class Learned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, logits: Tensor, boxes: Tensor) -> Tensor:
            return self.scale * mask_projection_loss(logits, boxes)

    assert len(list(MaskRCNNLoss(mask=MaskBySupervision(boxes=Learned())).parameters())) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_computed_in_float32(dtype):
    labels = MaskLabels.of_masks(torch.ones(2, 4, 4))
    found = MaskBySupervision()(torch.zeros(2, 4, 4, dtype=dtype), labels)
    torch.testing.assert_close(found, torch.full((2,), math.log(2)))
