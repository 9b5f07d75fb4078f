"""maskloss/data/copy_paste.py: the masks are those of the composed image, compared pixel by pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from maskloss.data.copy_paste import paste_objects
from maskloss.masks.encoded import EncodedMasks
from tests.data.scenes import extents


def sample(
    height: int, width: int, count: int, *, first: int, seed: int, bitmaps: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """Make an image in which each object has a color of its own, `first` + its number, on a background of 0.

    Even objects are polygons, odd ones RLEs.
    """
    draw = np.random.default_rng(seed)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    segmentations, masks, boxes = [], [], []
    for number in range(count):
        x0, x1 = sorted(draw.choice(width + 1, 2, replace=False).tolist())
        y0, y1 = sorted(draw.choice(height + 1, 2, replace=False).tolist())
        bitmap = torch.zeros(height, width, dtype=torch.uint8)
        bitmap[y0:y1, x0:x1] = 1
        polygon = [[float(v) for v in (x0, y0, x1, y0, x1, y1, x0, y1)]]
        segmentations.append(
            polygon if number % 2 == 0 else coco_mask.encode(np.asfortranarray(bitmap.numpy()))
        )
        masks.append(bitmap)
        boxes.append([float(value) for value in (x0, y0, x1, y1)])
    for number, bitmap in enumerate(masks):
        image[:, bitmap.bool()] = first + number
    # Where objects overlap, the later one is in front, and its mask alone has these pixels.
    for number, bitmap in enumerate(masks):
        for later in masks[number + 1 :]:
            bitmap &= 1 - later
    visible = [number for number, bitmap in enumerate(masks) if bitmap.any()]
    stacked = torch.stack([masks[number] for number in visible])
    encoded = [coco_mask.encode(np.asfortranarray(masks[number].numpy())) for number in visible]
    # An object that nothing covers keeps its polygon.
    for place, number in enumerate(visible):
        if number % 2 == 0 and int(masks[number].sum()) == coco_area(segmentations[number], height, width):
            encoded[place] = segmentations[number]
    target = {
        "boxes": extents(stacked).float(),
        "labels": torch.tensor([first + number for number in visible]),
        "masks": stacked if bitmaps else EncodedMasks(encoded, height, width),
    }
    return image, target


def coco_area(segmentation: Any, height: int, width: int) -> int:
    return int(coco_mask.area(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))))


@pytest.mark.parametrize("bitmaps", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_each_mask_has_the_pixels_of_its_color(seed: int, bitmaps: bool) -> None:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(6, 20, size=4).tolist()
    image, target = sample(sizes[0], sizes[1], 4, first=1, seed=seed, bitmaps=bitmaps)
    other, other_target = sample(sizes[2], sizes[3], 4, first=101, seed=seed + 1000, bitmaps=bitmaps)
    composed, changed = paste_objects(image, target, other, other_target, seed)
    assert composed.shape == image.shape
    masks = changed["masks"].bitmaps() if isinstance(changed["masks"], EncodedMasks) else changed["masks"]
    assert len(changed["labels"]) == len(changed["boxes"]) == len(masks)
    for label, mask in zip(changed["labels"].tolist(), masks, strict=True):
        assert torch.equal(mask.bool(), composed[0] == label)
    torch.testing.assert_close(changed["boxes"], extents(masks).float())
    # Every pixel of an object in the image belongs to an object of the target.
    assert set(composed.unique().tolist()) - {0} == set(changed["labels"].tolist())


def test_about_half_of_the_objects_are_pasted_and_at_least_one() -> None:
    other, other_target = sample(32, 32, 6, first=101, seed=3)
    counts = []
    for seed in range(200):
        _, changed = paste_objects(
            torch.zeros(3, 32, 32, dtype=torch.uint8), empty(32), other, other_target, seed
        )
        counts.append(len(changed["labels"]))
    assert min(counts) >= 1
    assert 0.4 < np.mean(counts) / len(other_target["labels"]) < 0.6


def empty(size: int) -> dict[str, Any]:
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": EncodedMasks([], size, size),
        "image_id": 1,
    }


def test_nothing_changes_without_an_object_to_paste() -> None:
    image, target = sample(8, 9, 3, first=1, seed=0)
    composed, changed = paste_objects(image, target, torch.zeros(3, 8, 8, dtype=torch.uint8), empty(8), 0)
    assert torch.equal(composed, image)
    assert changed is target


def test_objects_that_are_not_touched_keep_their_polygons() -> None:
    square = [[0.0, 0.0, 2.5, 0.0, 2.5, 2.5, 0.0, 2.5]]
    target = {"boxes": torch.tensor([[0.0, 0, 2.5, 2.5]]), "labels": torch.tensor([1])}
    target["masks"] = EncodedMasks([square], 10, 10).horizontal_flip()
    target["boxes"] = torch.tensor([[7.5, 0.0, 10.0, 2.5]])
    source = {"boxes": torch.tensor([[0.0, 4, 4, 8]]), "labels": torch.tensor([2])}
    source["masks"] = EncodedMasks([[[0.0, 4, 4, 4, 4, 8, 0, 8]]], 10, 10)
    images = [torch.zeros(3, 10, 10, dtype=torch.uint8) for _ in range(2)]
    _, changed = paste_objects(images[0], target, images[1], source, 0)
    assert not changed["masks"].is_rle(0)
    assert changed["masks"].polygons(0)[0].max(axis=0).tolist() == [10.0, 2.5]
    assert changed["boxes"][0].tolist() == [7.5, 0.0, 10.0, 2.5]


def weakly_labeled(box: list[float], **fields: Any) -> tuple[Tensor, dict[str, Any]]:
    x0, y0, x1, y1 = box
    masks = EncodedMasks([[[x0, y0, x1, y0, x1, y1, x0, y1]], None], 8, 8)
    target = {"boxes": torch.tensor([box, box]), "labels": torch.tensor([1, 2]), "masks": masks, **fields}
    return torch.zeros(3, 8, 8, dtype=torch.uint8), target


def test_an_object_without_a_mask_is_not_pasted_and_dropped_if_it_is_covered() -> None:
    image, target = weakly_labeled([0.0, 0, 4, 4], has_mask=torch.tensor([True, False]))
    other, other_target = weakly_labeled([0.0, 0, 6, 6], has_mask=torch.tensor([True, False]))
    _, changed = paste_objects(image, target, other, other_target, 0)
    assert changed["labels"].tolist() == [1]
    assert changed["has_mask"].tolist() == [True]
    assert changed["boxes"].tolist() == [[0, 0, 6, 6]]


def test_weights_and_points_are_joined() -> None:
    points = torch.tensor([[[1.0, 1.0, 1.0], [7.0, 7.0, 0.0]]] * 2)
    image, target = weakly_labeled([0.0, 0, 4, 4], weights=torch.tensor([0.5, 0.25]), points=points)
    other, other_target = weakly_labeled([0.0, 0, 2, 2], points=points[:, :1])
    _, changed = paste_objects(image, target, other, other_target, 0)
    assert changed["weights"].tolist() == [0.5, 0.25, 1.0]
    # The pasted square covers (1, 1), and the shorter list of points is padded.
    assert changed["points"][:, :, 2].tolist() == [[-1, 0], [-1, 0], [1, -1]]
    assert target["points"][0, 0, 2] == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_pasted_box_that_is_larger_than_its_mask_stays_in_the_image(seed: int) -> None:
    square = [[[6.0, 6, 10, 6, 10, 10, 6, 10]]]
    source = {"boxes": torch.tensor([[0.0, 0, 16, 16]]), "labels": torch.tensor([2])}
    source["masks"] = EncodedMasks(square, 16, 16)
    images = [torch.zeros(3, size, size, dtype=torch.uint8) for size in (11, 16)]
    _, changed = paste_objects(images[0], empty(11), images[1], source, seed)
    boxes = changed["boxes"]
    if len(boxes):
        assert boxes.min() >= 0
        assert boxes.max() <= 11
        inner = extents(changed["masks"].bitmaps()).float()
        assert (boxes[:, :2] <= inner[:, :2]).all()
        assert (boxes[:, 2:] >= inner[:, 2:]).all()
