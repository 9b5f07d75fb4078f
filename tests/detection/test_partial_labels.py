"""Objects without a mask do not enter the mask term; background in ignored regions is not sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import maskloss
from maskloss import EncodedMasks, MaskRCNNLoss
from maskloss.detection.matching import mostly_inside
from maskloss.detection.sampling import sample_padded
from maskloss.losses import mask_bce_loss

from .small_models import batch, tiny_faster_rcnn, tiny_mask_rcnn, training_pass

Target = dict[str, Any]


class Recording:
    """A mask term that records its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
        self.calls.append((mask_logits, mask_targets))
        return mask_bce_loss(mask_logits, mask_targets)


def mask_pass(targets: list[Target], *, sync_free: bool = False) -> tuple[dict[str, Tensor], Recording, Any]:
    term = Recording()
    model = maskloss.convert(tiny_mask_rcnn(), MaskRCNNLoss(mask=term), sync_free=sync_free)
    losses, gradients = training_pass(model, batch()[0], targets)
    return losses, term, gradients


def polygons_or_none(target: Target, known: list[bool]) -> EncodedMasks:
    polygons = []
    for (x1, y1, x2, y2), has in zip(target["boxes"].tolist(), known, strict=True):
        polygons.append([[x1, y1, x2, y1, x1, y2]] if has else None)
    return EncodedMasks(polygons, *target["masks"].shape[1:])


def in_three_ways(way: str, known: list[list[bool]]) -> list[Target]:
    """Return the targets of `batch()` in which only some objects have masks, expressed in one of three ways."""
    _, targets = batch()
    for target, has in zip(targets, known, strict=True):
        if way == "None":
            target["masks"] = polygons_or_none(target, has)
        else:
            target["has_mask"] = torch.tensor(has)
        if way == "has_mask without masks":
            del target["masks"]
    return targets


@pytest.mark.parametrize("sync_free", [False, True])
@pytest.mark.parametrize("way", ["has_mask", "None"])
def test_the_mask_term_uses_only_objects_with_a_mask(way, sync_free):
    whole = in_three_ways(way, [[True, True], [True, True]])
    losses, term, _ = mask_pass(whole, sync_free=sync_free)
    partial, partial_term, _ = mask_pass(
        in_three_ways(way, [[True, False], [False, True]]), sync_free=sync_free
    )
    logits, grids = term.calls[0]
    own_logits, own_grids = partial_term.calls[0]
    # The samples are the same, so the remaining targets are a subsequence of the full ones.
    kept = [row for row, grid in enumerate(grids) if any(torch.equal(grid, own) for own in own_grids)]
    assert 0 < len(own_grids) < len(grids)
    assert torch.equal(own_logits, logits[kept])
    expected = mask_bce_loss(logits[kept], grids[kept]).mean()
    assert partial["loss_mask"].item() == pytest.approx(expected.item(), rel=1e-6)
    for key in losses.keys() - {"loss_mask"}:
        assert torch.equal(partial[key], losses[key]), key


@pytest.mark.parametrize("sync_free", [False, True])
def test_the_mask_term_uses_the_right_objects(sync_free):
    # In the second image, only the second object has a mask, and it does not overlap the first object's mask.
    targets = in_three_ways("has_mask", [[False, False], [False, True]])
    targets[1]["masks"][0] = 1 - targets[1]["masks"][1]
    _, term, _ = mask_pass(targets, sync_free=sync_free)
    with_both = in_three_ways("has_mask", [[False, False], [True, True]])
    with_both[1]["masks"] = targets[1]["masks"]
    _, both, _ = mask_pass(with_both, sync_free=sync_free)
    only_second = in_three_ways("has_mask", [[False, False], [True, True]])
    only_second[1]["masks"] = targets[1]["masks"].clone()
    only_second[1]["masks"][0] = 0
    _, marked, _ = mask_pass(only_second, sync_free=sync_free)
    rows = [
        row
        for row in range(len(both.calls[0][1]))
        if torch.equal(both.calls[0][1][row], marked.calls[0][1][row])
    ]
    assert torch.equal(term.calls[0][1], both.calls[0][1][rows])


@pytest.mark.parametrize("sync_free", [False, True])
@pytest.mark.parametrize("way", ["has_mask", "None", "has_mask without masks"])
def test_a_batch_without_any_mask_gives_a_connected_zero_under_every_key(way, sync_free):
    targets = in_three_ways(way, [[False, False], [False, False]])
    losses, _, gradients = mask_pass(targets, sync_free=sync_free)
    expected, _, _ = mask_pass(batch()[1], sync_free=sync_free)
    assert losses.keys() == expected.keys()
    assert losses["loss_mask"].item() == 0
    for key in losses.keys() - {"loss_mask"}:
        assert torch.equal(losses[key], expected[key]), key
    assert all(gradient is not None for gradient in gradients.values())
    assert gradients["roi_heads.mask_predictor.mask_fcn_logits.weight"].abs().max() == 0


def test_has_mask_of_all_true_changes_nothing():
    losses, _, gradients = mask_pass(in_three_ways("has_mask", [[True, True], [True, True]]))
    expected, _, expected_gradients = mask_pass(batch()[1])
    assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in expected.items()}
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


def test_masks_of_objects_without_one_are_never_read():
    targets = in_three_ways("has_mask", [[True, False], [True, True]])
    expected, _, _ = mask_pass(targets)
    targets = in_three_ways("has_mask", [[True, False], [True, True]])
    targets[0]["masks"][1] = 255
    losses, _, _ = mask_pass(targets)
    assert torch.equal(losses["loss_mask"], expected["loss_mask"])


def test_losses_and_detections_leaves_objects_without_masks_out_too():
    model = maskloss.convert(tiny_mask_rcnn())
    targets = in_three_ways("has_mask", [[False, False], [False, False]])
    losses, _ = maskloss.losses_and_detections(model, batch()[0], targets)
    assert losses["loss_mask"].item() == 0


def test_a_model_without_masks_accepts_has_mask():
    targets = in_three_ways("has_mask without masks", [[True, False], [False, False]])
    for target in targets:
        target.pop("keypoints")
    training_pass(maskloss.convert(tiny_faster_rcnn()), batch()[0], targets)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([1, 0]), r"has_mask: expected a bool tensor \(2,\).*got torch\.int64 \(2,\)"),
        (torch.tensor([True]), r"has_mask: expected a bool tensor \(2,\).*got torch\.bool \(1,\)"),
        ([True, False], r"has_mask: expected a bool tensor \(2,\).*got list"),
    ],
    ids=["int", "too few", "a list"],
)
def test_an_invalid_has_mask_raises(value, message):
    images, targets = batch()
    targets[0]["has_mask"] = value
    with pytest.raises(TypeError, match=rf"^image 0 of the batch \(image_id 40\), {message}"):
        maskloss.convert(tiny_mask_rcnn()).train()(images, targets)


def test_has_mask_without_masks_raises():
    images, targets = batch()
    targets[0]["has_mask"] = torch.tensor([False, True])
    del targets[0]["masks"]
    with pytest.raises(ValueError, match="has no masks, but has_mask says that an object has one"):
        maskloss.convert(tiny_mask_rcnn()).train()(images, targets)


# Ignored regions.


def test_mostly_inside_by_hand():
    regions = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
    boxes = torch.tensor(
        [
            [0.0, 0.0, 10.0, 10.0],  # all of it
            [0.0, 0.0, 10.0, 20.0],  # half of it, which is not more than half
            [0.0, 0.0, 10.0, 19.0],  # 10 of 19
            [5.0, 0.0, 25.0, 10.0],  # half of it, in two regions
            [40.0, 0.0, 50.0, 10.0],  # nothing
        ]
    )
    assert mostly_inside(boxes, regions).tolist() == [True, False, True, False, False]
    assert not mostly_inside(boxes, regions[:0]).any()


def with_regions() -> list[Target]:
    _, targets = batch()
    targets[0]["ignore_boxes"] = torch.tensor([[40.0, 0.0, 80.0, 40.0], [0.0, 40.0, 20.0, 64.0]])
    targets[1]["ignore_boxes"] = torch.zeros(0, 4)
    return targets


def sampled_rois(*, sync_free: bool, targets: list[Target]) -> tuple[list[Tensor], Tensor]:
    """Return the RoIs per image that the box branch processes in a step, and the labels in the loss's batch."""
    rois: list[Tensor] = []
    labels: list[Tensor] = []

    def classification(logits: Tensor, given: Tensor) -> Tensor:
        labels.append(given)
        return torch.nn.functional.cross_entropy(logits, given, reduction="none")

    model = maskloss.convert(
        tiny_mask_rcnn(), MaskRCNNLoss(classification=classification), sync_free=sync_free
    )
    # Without the mask branch the pooler is called once, for the box branch.
    model.roi_heads.loss.weights = maskloss.LossWeights(mask=0.0)
    model.roi_heads.box_roi_pool.register_forward_pre_hook(lambda _, args: rois.extend(args[1]))
    training_pass(model, batch()[0], targets)
    return rois, labels[0]


def test_background_in_an_ignored_region_is_not_sampled():
    # The image has the network's input size, so regions do not move.
    region = torch.tensor([[0.0, 0.0, 80.0, 30.0]])
    targets = batch()[1]
    before, before_labels = sampled_rois(sync_free=False, targets=targets)
    background = before_labels[: len(before[0])] == 0
    assert mostly_inside(before[0][background], region).any()
    targets[0]["ignore_boxes"] = region
    after, labels = sampled_rois(sync_free=False, targets=targets)
    background = labels[: len(after[0])] == 0
    assert background.any()
    assert not mostly_inside(after[0][background], region).any()
    # Objects in the region are still sampled.
    assert (
        mostly_inside(after[0][~background], region).any()
        == mostly_inside(before[0][before_labels[: len(before[0])] > 0], region).any()
    )


def test_background_in_an_ignored_region_is_not_sampled_without_synchronization(monkeypatch):
    seen: list[list[Tensor]] = []
    own = sample_padded
    monkeypatch.setattr(
        "maskloss.detection.roi_heads.sample_padded",
        lambda labels, sampler: seen.append(labels) or own(labels, sampler),
    )
    targets = batch()[1]
    sampled_rois(sync_free=True, targets=targets)
    targets[0]["ignore_boxes"] = torch.tensor([[0.0, 0.0, 80.0, 64.0]])
    sampled_rois(sync_free=True, targets=targets)
    before, after = seen
    assert (before[0] == 0).any()
    assert not (after[0] == 0).any()
    assert torch.equal(after[0] > 0, before[0] > 0)
    assert torch.equal(after[1], before[1])


def test_anchors_in_an_ignored_region_are_neither_object_nor_background():
    model = maskloss.convert(tiny_mask_rcnn()).train()
    images, targets = model.transform(batch()[0], [with_regions()[0], batch()[1][1]])
    features = {"0": model.backbone(images.tensors)}
    anchors = model.rpn.anchor_generator(images, list(features.values()))
    plain = [{k: v for k, v in target.items() if k != "ignore_boxes"} for target in targets]
    expected, _ = model.rpn.assign_targets_to_anchors(anchors, plain)
    labels, _ = model.rpn.assign_targets_to_anchors(anchors, targets)
    inside = mostly_inside(anchors[0], targets[0]["ignore_boxes"])
    assert (labels[0][inside & (expected[0] == 0)] == -1).all()
    assert (inside & (expected[0] == 0)).any()
    changed = labels[0] != expected[0]
    assert torch.equal(changed, inside & (expected[0] == 0))
    assert torch.equal(labels[1], expected[1])


def test_an_image_without_objects_may_have_ignored_regions():
    images, targets = batch()
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 80, dtype=torch.uint8),
        "ignore_boxes": torch.tensor([[0.0, 0.0, 80.0, 64.0]]),
    }
    targets[1]["ignore_boxes"] = torch.tensor([])
    losses, _ = training_pass(maskloss.convert(tiny_mask_rcnn()), images, [empty, targets[1]])
    assert all(value.isfinite() for value in losses.values())


def test_regions_are_resized_with_the_image():
    model = maskloss.convert(tiny_mask_rcnn())
    images, targets = model.transform(batch()[0], with_regions())
    height, width = images.image_sizes[0]
    expected = torch.tensor(
        [[40 / 80 * width, 0, width, 40 / 64 * height], [0, 40 / 64 * height, 0.25 * width, height]]
    )
    assert torch.allclose(targets[0]["ignore_boxes"], expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([[0.0, 0, 5]]), r"ignore_boxes: expected shape \(I, 4\), got \(1, 3\)"),
        (torch.tensor([[9.0, 0, 5, 5]]), "ignore_boxes: a box is not finite or has no area"),
        (torch.tensor([[0.0, 0, float("nan"), 5]]), "ignore_boxes: a box is not finite or has no area"),
    ],
)
def test_bad_regions_raise(value, message):
    images, targets = batch()
    targets[1]["ignore_boxes"] = value
    with pytest.raises(ValueError, match=rf"^image 1 of the batch \(image_id 41\), {message}"):
        maskloss.convert(tiny_mask_rcnn()).train()(images, targets)
