"""Weights, labeled points and boxes as supervision: from the target through matching and sampling to every term."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads as StockRoIHeads
from torchvision.ops import roi_align

import maskloss
from maskloss import EncodedMasks, LossWeights, MaskRCNNLoss, MaskTargets
from maskloss.detection.mask_branch import box_grids_of
from maskloss.losses import MaskBoxLoss, MaskBySupervision, MaskLabels, Supervision, mask_bce_loss
from maskloss.losses.terms import TERMS

from .small_models import batch, tiny_keypoint_rcnn, tiny_mask_rcnn, training_pass

Target = dict[str, Any]


class RecordingPoints:
    """A term of labeled points that records its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, mask_logits: Tensor, coords: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((mask_logits, coords, labels))
        return mask_logits.mean(dim=(1, 2))


def with_weights(weights: list[list[float]]) -> list[Target]:
    _, targets = batch()
    return [{**target, "weights": torch.tensor(own)} for target, own in zip(targets, weights, strict=True)]


def losses_of(targets: list[Target], *, sync_free: bool = False, model: Any = None) -> dict[str, Tensor]:
    # A constant divisor, so that sums over positives can be compared.
    loss = MaskRCNNLoss(normalizers={"mask": lambda _: 10})
    model = maskloss.convert(model or tiny_mask_rcnn(), loss, sync_free=sync_free)
    return training_pass(model, batch()[0], targets)[0]


@pytest.mark.parametrize("sync_free", [False, True])
@pytest.mark.parametrize("make", [tiny_mask_rcnn, tiny_keypoint_rcnn])
def test_weights_of_1_change_nothing(make, sync_free):
    images, targets = batch()
    results = []
    for given in (targets, with_weights([[1, 1], [1, 1]]), [with_weights([[1, 1], [1, 1]])[0], targets[1]]):
        model = maskloss.convert(make(), sync_free=sync_free)
        results.append(training_pass(model, images, given))
    for losses, gradients in results[1:]:
        for key, value in results[0][0].items():
            assert torch.equal(losses[key], value), key
        for name, gradient in results[0][1].items():
            # A gradient that is multiplied by 1 may be summed in another order.
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("sync_free", [False, True])
@pytest.mark.parametrize("make", [tiny_mask_rcnn, tiny_keypoint_rcnn])
def test_a_weight_multiplies_what_its_object_adds_to_every_term(make, sync_free):
    def total(*weights: float) -> dict[str, Tensor]:
        given = with_weights([[weights[0], weights[1]], [weights[2], weights[3]]])
        return losses_of(given, sync_free=sync_free, model=make())

    nothing = total(0, 0, 0, 0)
    shares = [total(*(float(other == own) for other in range(4))) for own in range(4)]
    mixed = total(0.5, 2, 0, 3)
    for key, value in nothing.items():
        parts = [share[key] - value for share in shares]
        expected = value + 0.5 * parts[0] + 2 * parts[1] + 3 * parts[3]
        torch.testing.assert_close(mixed[key], expected, rtol=1e-4, atol=1e-5)
        # Background anchors and RoIs remain.
        background = key in (TERMS["objectness"].key, TERMS["classification"].key)
        assert (value > 0) if background else (value == 0), key
        if key != "loss_keypoint":
            assert sum(part > 0 for part in parts) >= 2, key


@pytest.mark.parametrize("sync_free", [False, True])
def test_the_weighted_object_is_the_matched_one(sync_free):
    _, targets = batch()
    first, second = with_weights([[1, 0], [0, 0]]), with_weights([[0, 1], [0, 0]])
    for weighted, known in ((first, [True, False]), (second, [False, True])):
        alone = copy.deepcopy(targets)
        for target, has in zip(alone, (known, [False, False]), strict=True):
            target["has_mask"] = torch.tensor(has)
        found = losses_of(weighted, sync_free=sync_free)["loss_mask"]
        expected = losses_of(alone, sync_free=sync_free)["loss_mask"]
        assert found > 0
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_classification_divisor_counts_weighted_rois_once():
    images, _ = batch()
    loss = MaskRCNNLoss(classification=lambda logits, labels: torch.ones_like(labels, dtype=torch.float32))
    for weight in (1.0, 0.0):
        model = maskloss.convert(tiny_mask_rcnn(), copy.deepcopy(loss))
        losses, _ = training_pass(model, images, with_weights([[weight] * 2] * 2))
        if weight:
            assert losses["loss_classifier"] == 1
    # The share of background among the sampled RoIs.
    assert 0 < losses["loss_classifier"] < 1


def test_losses_in_evaluation_use_weights_and_do_not_depend_on_the_grouping():
    images, _ = batch()
    targets = with_weights([[0.5, 2], [0, 3]])
    model = maskloss.convert(tiny_mask_rcnn()).eval()
    losses, _ = maskloss.losses_and_detections(model, images, targets)
    one_by_one = [
        maskloss.losses_and_detections(model, images[i : i + 1], targets[i : i + 1])[0] for i in (0, 1)
    ]
    unweighted, _ = maskloss.losses_and_detections(model, images, batch()[1])
    for key, value in losses.items():
        assert value != unweighted[key]
    assert set(one_by_one[0]) == set(losses)


def points_of(target: Target, count: int = 4) -> Tensor:
    """Random points in the image, half of them inside the object."""
    height, width = target["masks"].shape[-2:]
    generator = torch.Generator().manual_seed(height)
    points = torch.rand(len(target["boxes"]), count, 3, generator=generator)
    points[..., :2] *= torch.tensor([width, height])
    low, high = target["boxes"][:, None, :2], target["boxes"][:, None, 2:]
    inside = torch.rand(len(target["boxes"]), count // 2, 2, generator=generator)
    points[:, : count // 2, :2] = low + inside * (high - low)
    points[..., 2] = torch.tensor([1.0, 0.0]).repeat(count // 2)
    return points


@pytest.mark.parametrize("sync_free", [False, True])
@pytest.mark.parametrize("aligned", [True, False])
def test_points_arrive_in_the_coordinates_of_their_rois(aligned, sync_free, monkeypatch):
    images, targets = batch()
    for target in targets:
        target["points"] = points_of(target)
        del target["masks"]
    term = RecordingPoints()
    loss = MaskRCNNLoss(
        mask=MaskBySupervision(points=term), mask_targets=MaskTargets(aligned=aligned, binary=False)
    )
    model = maskloss.convert(tiny_mask_rcnn(), loss, sync_free=sync_free)
    # The branch sees the RoIs, whose boxes map the coordinates back.
    seen: list[Any] = []
    branch = model.roi_heads.mask_branch
    original = type(branch).losses
    monkeypatch.setattr(
        type(branch), "losses", lambda self, f, p, t: seen.append((p, t)) or original(self, f, p, t)
    )
    losses, _ = training_pass(model, images, targets)
    ((_, coords, labels),) = term.calls
    ((positives, resized),) = seen
    assert len(coords) == positives.counts.positives > 0
    assert losses["loss_mask"] != 0
    boxes = torch.cat(positives.boxes)
    shift = 0 if aligned else 0.5
    in_px = boxes[:, None, :2] + coords * (boxes[:, None, 2:] - boxes[:, None, :2]) + shift
    expected = torch.cat(
        [target["points"][idxs] for target, idxs in zip(resized, positives.matched_idxs, strict=True)]
    )
    torch.testing.assert_close(in_px, expected[..., :2], rtol=1e-4, atol=1e-3)
    inside = ((coords >= 0) & (coords <= 1)).all(dim=-1)
    assert torch.equal(labels, torch.where(inside, expected[..., 2], -1.0))
    assert inside.any()
    assert not inside.all()
    # The transform has scaled them with the image.
    own = targets[0]["points"][0, 0, :2] / torch.tensor(images[0].shape[:0:-1])
    scaled = resized[0]["points"][0, 0, :2] / torch.tensor(positives.image_sizes[0][::-1])
    torch.testing.assert_close(own, scaled)


def labels_of(loss: MaskRCNNLoss, targets: list[Target], images: list[Tensor] | None = None) -> Any:
    """Train one step and return the branch's positives and the labels that the mask term got."""
    calls: list[MaskLabels] = []
    term: Any = loss.mask
    own_forward = term.forward
    term.forward = lambda logits, labels: calls.append(labels) or own_forward(logits, labels)
    model = maskloss.convert(tiny_mask_rcnn(), loss)
    seen: list[Any] = []
    branch = model.roi_heads.mask_branch
    own_losses = branch.losses
    branch.losses = lambda f, p, t: seen.append((p, t)) or own_losses(f, p, t)
    losses, gradients = training_pass(model, images or batch()[0], targets)
    return losses, gradients, calls[0], *seen[0]


@pytest.mark.parametrize("aligned", [True, False])
def test_image_crops_are_the_image_under_the_rois(aligned):
    loss = MaskRCNNLoss(
        mask=MaskBySupervision(boxes=MaskBoxLoss()), mask_targets=MaskTargets(aligned=aligned, binary=False)
    )
    images, targets = batch()
    targets = [{**target, "has_mask": torch.tensor([False, True])} for target in targets]
    _, _, labels, positives, resized = labels_of(loss, targets)
    size = labels.mask_targets.shape[-1]
    assert labels.image_crops.shape == (positives.counts.positives, 3, size, size)
    first = len(positives.boxes[0])
    for crops, image, boxes in (
        (labels.image_crops[:first], resized[0]["resized_image"], positives.boxes[0]),
        (labels.image_crops[first:], resized[1]["resized_image"], positives.boxes[1]),
    ):
        expected = roi_align(image[None], [boxes], size, sampling_ratio=2, aligned=aligned)
        torch.testing.assert_close(crops, expected)
    # The image that the transform has kept is that of the user, not the normalized one.
    assert resized[0]["resized_image"].min() >= -1e-6
    mean = resized[0]["resized_image"].mean()
    torch.testing.assert_close(mean, images[0].mean(), rtol=0.02, atol=0)


def test_each_object_gets_the_best_label_that_it_has():
    images, targets = batch(1)
    targets[0]["points"] = points_of(targets[0])
    for known, has_points, terms, expected in (
        ([True, True], [True, True], {"boxes": MaskBoxLoss()}, {"MASK"}),
        ([True, False], [True, True], {}, {"MASK", "POINTS"}),
        ([False, False], [True, False], {"boxes": MaskBoxLoss()}, {"POINTS", "BOX"}),
        ([True, False], [True, False], {}, {"MASK"}),
        ([True, True], [True, False], {"mask": None, "boxes": MaskBoxLoss()}, {"POINTS", "BOX"}),
        ([True, True], [True, False], {"mask": None, "points": None, "boxes": MaskBoxLoss()}, {"BOX"}),
    ):
        target = {**targets[0], "has_mask": torch.tensor(known), "points": targets[0]["points"].clone()}
        target["points"][~torch.tensor(has_points), :, 2] = -1
        loss = MaskRCNNLoss(mask=MaskBySupervision(**terms))
        losses, _, labels, positives, _ = labels_of(loss, [target], images)
        found = {kind.name for kind, rows in labels.rows.items() if len(rows)}
        assert found == expected
        assert sorted(torch.cat(list(labels.rows.values())).tolist()) == list(
            range(positives.counts.positives)
        )
        assert losses["loss_mask"].isfinite()
        assert losses["loss_mask"] > 0
    # Only objects whose label has a term are left: here the second one has none.
    target = {**targets[0], "has_mask": torch.tensor([True, False]), "points": targets[0]["points"].clone()}
    target["points"][1, :, 2] = -1
    *_, positives, _ = labels_of(MaskRCNNLoss(mask=MaskBySupervision()), [target], images)
    assert set(torch.cat(positives.matched_idxs).tolist()) == {0}


def test_a_mix_of_labels_has_one_divisor():
    images, targets = batch(1)
    target = {
        **targets[0],
        "points": points_of(targets[0]),
        "has_mask": torch.tensor([True, False]),
    }
    values = {"mask": 1.0, "points": 10.0}
    loss = MaskRCNNLoss(
        mask=MaskBySupervision(
            mask=lambda logits, _: 0 * logits.sum(dim=(1, 2)) + values["mask"],
            points=lambda logits, *_: 0 * logits.sum(dim=(1, 2)) + values["points"],
        )
    )
    losses, _, labels, positives, _ = labels_of(loss, [target], images)
    masks, points = (len(labels.rows[kind]) for kind in (Supervision.MASK, Supervision.POINTS))
    assert masks + points == positives.counts.positives
    assert losses["loss_mask"].item() == pytest.approx((masks + 10 * points) / (masks + points))


def test_all_masks_give_the_numbers_of_the_plain_term():
    images, targets = batch()
    plain = training_pass(maskloss.convert(tiny_mask_rcnn(), "aligned"), images, targets)
    weak = training_pass(maskloss.convert(tiny_mask_rcnn(), "weak"), images, targets)
    for key, value in plain[0].items():
        torch.testing.assert_close(weak[0][key], value, rtol=1e-6, atol=0)
    for name, gradient in plain[1].items():
        if gradient is not None:
            torch.testing.assert_close(weak[1][name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("sync_free", [False, True])
def test_without_objects_the_mask_term_is_a_zero_with_a_graph(sync_free):
    images, targets = batch()
    for target in targets:
        for key in ("boxes", "labels", "masks"):
            target[key] = target[key][:0]
        target["points"] = torch.tensor([])
        target["weights"] = torch.tensor([])
    model = maskloss.convert(tiny_mask_rcnn(), "weak", sync_free=sync_free)
    losses, gradients = training_pass(model, images, targets)
    assert losses["loss_mask"] == 0
    assert all(g is not None and not g.any() for n, g in gradients.items() if "mask" in n)


def test_box_grids_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    low = 20 * torch.rand(5, 2, generator=generator)
    boxes = torch.cat([low, low + 5 + 10 * torch.rand(5, 2, generator=generator)], dim=1)
    gt_boxes = boxes + 6 * torch.rand(5, 4, generator=generator) - 3
    found = box_grids_of(gt_boxes, boxes, 4)
    fine = 200
    for grid, box, gt in zip(found, boxes, gt_boxes, strict=True):
        steps = (torch.arange(4 * fine) + 0.5) / (4 * fine)
        x, y = box[0] + steps * (box[2] - box[0]), box[1] + steps * (box[3] - box[1])
        inside = ((y >= gt[1]) & (y <= gt[3]))[:, None] & ((x >= gt[0]) & (x <= gt[2]))[None]
        expected = inside.float().reshape(4, fine, 4, fine).mean(dim=(1, 3))
        torch.testing.assert_close(grid, expected, rtol=0, atol=0.02)


def test_a_term_with_the_image_gets_it():
    seen: list[tuple[Tensor, ...]] = []

    class OfTheImage:
        uses_image = True

        def __call__(self, logits: Tensor, masks: Tensor, crops: Tensor, boxes: Tensor) -> Tensor:
            seen.append((logits, masks, crops, boxes))
            return mask_bce_loss(logits, masks)

    images, targets = batch()
    losses, _ = training_pass(
        maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(mask=OfTheImage())), images, targets
    )
    plain, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), images, targets)
    assert torch.equal(losses["loss_mask"], plain["loss_mask"])
    ((logits, masks, crops, boxes),) = seen
    assert logits.shape == masks.shape == boxes.shape == crops[:, 0].shape
    # The RoIs lie around their objects.
    assert boxes.mean() > 0.5


def test_a_foreign_transform_cannot_keep_images():
    model = tiny_mask_rcnn()
    model.transform.__class__ = type("Other", (type(model.transform),), {})
    with pytest.raises(TypeError, match="needs the images, which only torchvision's own"):
        maskloss.convert(model, "weak")
    assert type(model.roi_heads) is StockRoIHeads
    maskloss.convert(model)
    images, targets = batch()
    targets[0]["points"] = points_of(targets[0])
    with pytest.raises(TypeError, match=r"points: need torchvision's own transform"):
        model(images, targets)


BAD: dict[str, tuple[Target, type[Exception], str]] = {
    "negative": ({"weights": torch.tensor([1.0, -1.0])}, ValueError, r"weights: a weight is negative or not"),
    "nan": (
        {"weights": torch.tensor([float("nan"), 1.0])},
        ValueError,
        r"weights: a weight is negative or not",
    ),
    "list": ({"weights": [1.0, 1.0]}, TypeError, r"weights: expected a float tensor \(2,\), .* got list"),
    "bools": ({"weights": torch.ones(2, dtype=torch.bool)}, TypeError, r"weights: .* got torch.bool"),
    "count": (
        {"weights": torch.ones(3)},
        ValueError,
        r"weights: expected shape \(2,\), one per box, got \(3,\)",
    ),
    "shape": ({"points": torch.zeros(2, 3)}, ValueError, r"points: expected shape \(2, K, 3\)"),
    "objects": ({"points": torch.zeros(3, 1, 3)}, ValueError, r"points: expected shape \(2, K, 3\)"),
    "points list": ({"points": [[0, 0, 1]]}, TypeError, r"points: expected a float tensor .* got list"),
    "label": ({"points": torch.tensor([[[1.0, 1, 2]]] * 2)}, ValueError, r"points: a label is not 1 inside"),
    "outside": (
        {"points": torch.tensor([[[500.0, 1, 1]]] * 2)},
        ValueError,
        r"points: a labeled point is outs",
    ),
    "not finite": (
        {"points": torch.tensor([[[torch.nan, 1, 0]]] * 2)},
        ValueError,
        r"points: a labeled point",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_weights_and_points_raise_with_image_and_field(name):
    fields, error, message = BAD[name]
    images, targets = batch()
    targets[1] = {**targets[1], **fields, "image_id": 77}
    model = maskloss.convert(tiny_mask_rcnn()).train()
    with pytest.raises(error, match=rf"image 1 of the batch \(image_id 77\), {message}"):
        model(images, targets)


def test_a_mask_that_is_none_cannot_be_one():
    images, targets = batch()
    target = targets[1]
    x1, y1, x2, y2 = target["boxes"][0].tolist()
    masks = EncodedMasks([[[x1, y1, x2, y1, x2, y2]], None], *target["masks"].shape[1:])
    model = maskloss.convert(tiny_mask_rcnn()).train()
    good = {**target, "masks": masks, "has_mask": torch.tensor([True, False])}
    model(images, [targets[0], good])
    bad = {**target, "masks": masks, "has_mask": torch.tensor([True, True])}
    with pytest.raises(
        ValueError, match=r"image 1 of the batch .*, has_mask: is True for .* None \(instance 1: box"
    ):
        model(images, [targets[0], bad])


def test_unlabeled_points_may_be_anywhere():
    images, targets = batch()
    targets[0]["points"] = torch.full((2, 3, 3), -1.0)
    targets[0]["points"][..., 0] = torch.nan
    losses, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), images, targets)
    assert all(value.isfinite() for value in losses.values())


def test_a_weight_of_the_mask_term_of_0_needs_no_images():
    loss = MaskRCNNLoss(mask=MaskBySupervision(boxes=MaskBoxLoss()), weights=LossWeights(mask=0.0))
    losses, _ = training_pass(maskloss.convert(tiny_mask_rcnn(), loss), *batch())
    assert losses["loss_mask"] == 0
