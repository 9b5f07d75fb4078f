"""Boxes in another format than xyxy in px are recognized by the masks, and other boxes are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import box_convert

import maskloss
from maskloss import EncodedMasks
from maskloss.detection.box_format import box_format_hint, mask_extents

from .small_models import batch, tiny_mask_rcnn, training_pass

Target = dict[str, Any]


def as_format(box_format: str, *, fractions: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def convert(boxes: Tensor, size: Tensor) -> Tensor:
        return box_convert(boxes / size if fractions else boxes, "xyxy", box_format)

    return convert


WRONG_FORMATS = {
    "x, y, width, height in px": as_format("xywh", fractions=False),
    "center x, center y, width, height in px": as_format("cxcywh", fractions=False),
    "corners in fractions of the image": as_format("xyxy", fractions=True),
    "x, y, width, height in fractions of the image": as_format("xywh", fractions=True),
    "center x, center y, width, height in fractions of the image": as_format("cxcywh", fractions=True),
}


def of_objects() -> tuple[list[Tensor], list[Target]]:
    """One image with two ellipses, whose boxes are valid when read in any format."""
    image = torch.rand(3, 120, 160, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[10.0, 12.0, 70.0, 60.0], [30.0, 40.0, 100.0, 110.0]])
    y, x = torch.meshgrid(torch.arange(120) + 0.5, torch.arange(160) + 0.5, indexing="ij")
    masks = []
    for x1, y1, x2, y2 in boxes.tolist():
        inside = ((x - (x1 + x2) / 2) / ((x2 - x1) / 2)) ** 2 + (
            (y - (y1 + y2) / 2) / ((y2 - y1) / 2)
        ) ** 2 <= 1
        masks.append(inside.to(torch.uint8))
    return [image], [
        {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": torch.stack(masks), "image_id": 7}
    ]


def encoded(masks: Tensor, kind: str) -> EncodedMasks:
    if kind == "rle":
        rles = [coco_mask.encode(np.asfortranarray(mask.numpy())) for mask in masks]
        return EncodedMasks(rles, *masks.shape[1:])
    polygons = []
    for x1, y1, x2, y2 in mask_extents(masks).tolist():
        polygons.append([[x1, y1, x2, y1, x2, y2, x1, y2]])
    return EncodedMasks(polygons, *masks.shape[1:])


@pytest.mark.parametrize("kind", ["bitmaps", "rle", "polygons"])
@pytest.mark.parametrize("words", WRONG_FORMATS)
def test_boxes_in_another_format_raise_and_the_format_is_named(words, kind):
    images, targets = of_objects()
    masks = targets[0]["masks"]
    targets[0]["masks"] = masks if kind == "bitmaps" else encoded(masks, kind)
    size = torch.tensor([160.0, 120.0, 160.0, 120.0])
    targets[0]["boxes"] = WRONG_FORMATS[words](targets[0]["boxes"], size)
    model = maskloss.convert(tiny_mask_rcnn()).train()
    with pytest.raises(ValueError, match=rf"^image 0 of the batch \(image_id 7\), boxes: .*{words}, not x1"):
        model(images, targets)


def test_the_suggested_box_conversion_is_correct():
    images, targets = of_objects()
    right = targets[0]["boxes"]
    targets[0]["boxes"] = box_convert(right, "xyxy", "xywh")
    hint = box_format_hint(images[0], targets[0])
    assert 'torchvision.ops.box_convert(boxes, "xywh", "xyxy")' in hint
    assert torch.equal(box_convert(targets[0]["boxes"], "xywh", "xyxy"), right)


@pytest.mark.parametrize("fractions", [False, True])
def test_boxes_with_y_first_are_recognized(fractions):
    # TensorFlow's and matterport's order.
    images, targets = of_objects()
    right = targets[0]["boxes"]
    targets[0]["boxes"] = right[:, [1, 0, 3, 2]] / (
        torch.tensor([120.0, 160.0, 120.0, 160.0]) if fractions else 1
    )
    hint = box_format_hint(images[0], targets[0])
    unit = "fractions of the image" if fractions else "px"
    assert hint.startswith(f"the masks show that the boxes are y1, x1, y2, x2 in {unit}, not x1")
    assert "; boxes[:, [1, 0, 3, 2]] converts them" in hint
    assert hint.endswith(", then multiply them by 160, 120, 160, 120") is fractions


LEGITIMATE = {
    "tight": lambda boxes: boxes,
    "loose": lambda boxes: boxes + torch.tensor([-10.0, -10.0, 10.0, 9.0]),
    "amodal, higher": lambda boxes: boxes + torch.tensor([[0.0, 0.0, 0.0, 48.0], [0.0, -30.0, 0.0, 9.0]]),
    "far off": lambda boxes: torch.tensor([[80.0, 5.0, 150.0, 30.0], [5.0, 80.0, 40.0, 118.0]]),
    "one tight, one far off": lambda boxes: torch.stack([boxes[0], torch.tensor([110.0, 3.0, 150.0, 20.0])]),
}


@pytest.mark.parametrize("kind", ["bitmaps", "rle", "polygons"])
@pytest.mark.parametrize("case", LEGITIMATE)
def test_boxes_that_are_not_tight_pass(case, kind):
    images, targets = of_objects()
    masks = targets[0]["masks"]
    targets[0]["masks"] = masks if kind == "bitmaps" else encoded(masks, kind)
    targets[0]["boxes"] = LEGITIMATE[case](targets[0]["boxes"])
    training_pass(maskloss.convert(tiny_mask_rcnn()), images, targets)


def test_one_box_that_is_not_xywh_rules_out_xywh_for_all():
    # One box fits another format by chance; the second box shows that the boxes are xyxy.
    images, targets = of_objects()
    targets[0]["boxes"][0] = box_convert(targets[0]["boxes"][:1], "xyxy", "xywh")[0]
    assert box_format_hint(images[0], targets[0]) is None


def test_boxes_are_compared_with_masks_in_the_first_batches_only(monkeypatch):
    compared = []
    monkeypatch.setattr(
        "maskloss.detection.target_checks.box_format_hint", lambda *_: compared.append(1) or None
    )
    model = maskloss.convert(tiny_mask_rcnn()).train()
    images, targets = batch(1)
    for _ in range(12):
        model(images, targets)
    assert len(compared) == 10


def test_extents_of_encoded_masks_are_those_of_their_bitmaps():
    _, targets = of_objects()
    masks = targets[0]["masks"]
    expected = mask_extents(masks)
    assert torch.equal(encoded(masks, "rle").extents(), expected)
    assert torch.equal(encoded(masks, "polygons").extents(), expected)
    flipped = encoded(masks, "rle").horizontal_flip().crop(5, 7, 90, 120)
    assert torch.equal(flipped.extents(), mask_extents(masks.flip(2)[:, 5:95, 7:127]))
    empty = mask_extents(torch.zeros((1, 4, 5), dtype=torch.uint8))
    assert empty.isnan().all()
