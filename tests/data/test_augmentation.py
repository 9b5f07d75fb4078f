"""maskloss/data/augmentation.py: images, boxes and masks move together, and masks stay encoded where they can."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from maskloss.data.augmentation import augmentation, augmented
from maskloss.masks.encoded import EncodedMasks

HEIGHT, WIDTH = 96, 128
#: Objects of a box, a polygon with a slant, and an RLE, (G, 4) xyxy.
BOXES = [[10.0, 20.0, 50.0, 60.0], [60.0, 10.0, 120.0, 90.0], [30.0, 50.0, 70.0, 80.0]]


def scene() -> tuple[Tensor, dict[str, Any]]:
    """An image whose first channel is 255 on the objects, and their target."""
    rectangle = [10.0, 20.0, 50.0, 20.0, 50.0, 60.0, 10.0, 60.0]
    kite = [90.0, 10.0, 120.0, 40.0, 90.0, 90.0, 60.0, 40.0]
    bitmap = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    bitmap[50:80, 30:70] = 1
    masks = EncodedMasks([[rectangle], [kite], coco_mask.encode(bitmap)], HEIGHT, WIDTH)
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    image[0] = 255 * masks.bitmaps().amax(0)
    return image, {
        "boxes": torch.tensor(BOXES),
        "labels": torch.tensor([1, 2, 3]),
        "masks": masks,
        "image_id": 7,
    }


def extents(masks: Tensor) -> Tensor:
    """Boxes around masks; torchvision's ends at the last pixel, ours at its far edge."""
    return masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])


def overlap(masks: Tensor, others: Tensor) -> Tensor:
    """IoU of each pair."""
    return (masks & others).sum(dim=(1, 2)) / (masks | others).sum(dim=(1, 2))


def changed(transforms: Any, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    return augmented(transforms, *scene(), seed)


RESIZING = {"resize", "random resize", "shorter side", "scale jitter", "resized crop", "large-scale jitter"}
EXACT = {
    "flip": v2.RandomHorizontalFlip(1.0),
    "resize": v2.Resize((150, 120)),
    "shorter side": v2.RandomShortestSize([70, 110], max_size=140),
    "scale jitter": v2.ScaleJitter((120, 120), (0.5, 1.5)),
    "vertical flip": v2.RandomVerticalFlip(1.0),
    "both flips": v2.Compose([v2.RandomVerticalFlip(1.0), v2.RandomHorizontalFlip(1.0)]),
    "center crop": v2.CenterCrop((60, 70)),
    "center crop of an odd size": v2.CenterCrop((61, 71)),
    "center crop that pads": v2.CenterCrop((111, 90)),
    "random resize": v2.RandomResize(80, 150),
    "crop": v2.RandomCrop((64, 80)),
    "crop with padding": v2.RandomCrop((110, 110), pad_if_needed=True),
    "zoom out": v2.RandomZoomOut(p=1.0, side_range=(1.2, 2.0)),
    "pad": v2.Pad([3, 5, 7, 11]),
    "pad x and y": v2.Pad([3, 5]),
    "IoU crop": v2.RandomIoUCrop(min_scale=0.6, trials=20),
    "resized crop": v2.RandomResizedCrop((90, 70), scale=(0.5, 1.0)),
    "large-scale jitter": v2.Compose(
        [
            v2.ScaleJitter((128, 128), (0.6, 1.6)),
            v2.RandomCrop((128, 128), pad_if_needed=True),
            v2.RandomHorizontalFlip(),
            v2.RandomPhotometricDistort(p=1.0),
        ]
    ),
    "in floats": v2.Compose([v2.RandomHorizontalFlip(1.0), v2.ToDtype(torch.float32, scale=True)]),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("seed", range(5))
def test_masks_stay_encoded_and_move_as_their_pixels_do(name: str, seed: int) -> None:
    image, target = scene()
    dense = {**target, "masks": tv_tensors.Mask(target["masks"].bitmaps())}
    dense["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(HEIGHT, WIDTH))
    torch.manual_seed(seed)
    expected_image, expected = EXACT[name](tv_tensors.Image(image), dense)
    result, moved = augmented(EXACT[name], image, target, seed)
    assert torch.equal(result, expected_image)
    kept = [label - 1 for label in moved["labels"].tolist()]
    assert torch.equal(moved["boxes"], expected["boxes"][kept].as_subclass(Tensor))
    assert isinstance(moved["masks"], EncodedMasks)
    assert moved["masks"].shape == (len(kept), *result.shape[-2:])
    pixels = expected["masks"][kept].bool()
    # Resized pixels are off by up to one along the edge, of 20 to 50; moved ones only where an edge is slanted.
    large = pixels.sum(dim=(1, 2)) >= 400
    ious = overlap(moved["masks"].bitmaps().bool(), pixels)[large]
    assert (ious > (0.8 if name in RESIZING else 0.96)).all()


def test_a_flip_moves_the_image_the_boxes_and_the_masks_together() -> None:
    image, target = changed(augmentation(horizontal_flip=1.0, photometric_distortion=0.0))
    assert torch.equal(image, scene()[0].flip(-1))
    assert target["boxes"].tolist() == [[WIDTH - x2, y1, WIDTH - x1, y2] for x1, y1, x2, y2 in BOXES]
    assert target["masks"].polygons(0)[0].tolist() == [[118, 20], [78, 20], [78, 60], [118, 60]]
    assert torch.equal(extents(target["masks"].bitmaps()[[0, 2]]), target["boxes"][[0, 2]])
    assert target["labels"].tolist() == [1, 2, 3]
    assert target["image_id"] == 7


def test_what_is_not_asked_for_changes_nothing() -> None:
    image, target = changed(augmentation(horizontal_flip=0.0, photometric_distortion=0.0))
    expected_image, expected = scene()
    assert torch.equal(image, expected_image)
    assert torch.equal(target["boxes"], expected["boxes"])
    assert torch.equal(target["masks"].bitmaps(), expected["masks"].bitmaps())


def test_photometric_distortion_changes_pixels_and_no_target() -> None:
    image, target = changed(augmentation(horizontal_flip=0.0, photometric_distortion=1.0), seed=1)
    expected_image, expected = scene()
    assert not torch.equal(image, expected_image)
    assert torch.equal(target["boxes"], expected["boxes"])
    assert torch.equal(target["masks"].bitmaps(), expected["masks"].bitmaps())


class CutAndGrow(v2.Transform):
    """Crops, and then pads to the size from before: what was cut off must stay off."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return functional.pad(functional.crop(inpt, 0, 0, HEIGHT, 40), [0, 0, WIDTH - 40, 0])


IN_PIXELS = {
    "rotation": v2.RandomRotation((20, 20)),
    "affine": v2.RandomAffine(10, translate=(0.1, 0.1)),
    "perspective": v2.RandomPerspective(p=1.0),
    "elastic": v2.ElasticTransform(),
    "crop, then pad": CutAndGrow(),
    "dropped objects": v2.Compose(
        [v2.RandomRotation((20, 20)), v2.RandomCrop((30, 30)), v2.SanitizeBoundingBoxes()]
    ),
    "flip, then rotation": v2.Compose([v2.RandomHorizontalFlip(1.0), v2.RandomRotation((20, 20))]),
}


@pytest.mark.parametrize("name", IN_PIXELS)
def test_what_has_no_exact_way_is_done_in_pixels_with_the_same_draws(name: str) -> None:
    image, target = scene()
    dense = {**target, "masks": tv_tensors.Mask(target["masks"].bitmaps())}
    dense["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(HEIGHT, WIDTH))
    torch.manual_seed(3)
    expected_image, expected = IN_PIXELS[name](tv_tensors.Image(image), dense)
    result, moved = augmented(IN_PIXELS[name], image, target, 3)
    assert torch.equal(result, expected_image)
    kept = [expected["labels"].tolist().index(label) for label in moved["labels"].tolist()]
    assert torch.equal(moved["masks"], expected["masks"][kept])
    assert type(moved["masks"]) is Tensor


def test_objects_that_are_pushed_out_are_dropped_from_every_field() -> None:
    class LeftPart(v2.Transform):
        def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
            return functional.crop(inpt, 0, 0, HEIGHT, 56)

    image, target = changed(LeftPart())
    assert image.shape == (3, HEIGHT, 56)
    assert target["boxes"].tolist() == [BOXES[0], [30, 50, 56, 80]]
    assert target["labels"].tolist() == [1, 3]
    assert torch.equal(extents(target["masks"].bitmaps()), target["boxes"])


def test_the_callers_target_stays_as_it_is() -> None:
    image, target = scene()
    augmented(v2.RandomHorizontalFlip(1.0), image, target, 0)
    assert target["boxes"].tolist() == BOXES
    assert torch.equal(target["masks"].bitmaps(), scene()[1]["masks"].bitmaps())


def test_an_image_without_objects_stays_without() -> None:
    image, target = scene()
    target.update(
        boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), masks=target["masks"][[]]
    )
    _, moved = augmented(EXACT["large-scale jitter"], image, target, 0)
    assert moved["boxes"].shape == (0, 4)
    assert moved["masks"].shape == (0, 128, 128)


class LeftPart(v2.Transform):
    """Cut the columns 0 to 57 out."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(functional.crop, inpt, 0, 0, HEIGHT, 58)


def test_regions_to_ignore_and_objects_without_masks_move_and_are_dropped_with_the_others() -> None:
    image, target = scene()
    target["ignore_boxes"] = torch.tensor([[0.0, 0.0, 30.0, 40.0], [100.0, 0.0, 128.0, 50.0]])
    target["has_mask"] = torch.tensor([True, False, True])
    _, flipped = augmented(v2.RandomHorizontalFlip(1.0), image, target, 0)
    assert flipped["ignore_boxes"].tolist() == [[98, 0, 128, 40], [0, 0, 28, 50]]
    assert type(flipped["ignore_boxes"]) is Tensor
    # The left half: the second object, from x = 60 on, and the second region are gone.
    _, cropped = augmented(LeftPart(), image, target, 0)
    assert cropped["ignore_boxes"].tolist() == [[0, 0, 30, 40]]
    assert cropped["has_mask"].tolist() == [True, True]
    assert len(cropped["boxes"]) == len(cropped["masks"]) == 2


# Everything that belongs to an object goes with it.


def full_target() -> dict[str, Any]:
    """Two objects, the first in the right half and the second in the left, with every kind of field."""
    boxes = torch.tensor([[70.0, 20, 90, 40], [10.0, 20, 30, 40]])
    squares = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes.tolist()]
    return {
        "boxes": boxes,
        "labels": torch.tensor([1, 2]),
        "masks": EncodedMasks(squares, HEIGHT, WIDTH),
        "area": torch.tensor([900.0, 400.0]),
        "iscrowd": torch.tensor([1, 0]),
        "weights": torch.tensor([0.5, 2.0]),
        "has_mask": torch.tensor([False, True]),
        "names": ["right", "left"],
        "scores": np.array([0.1, 0.2]),
        "keypoints": torch.tensor([[[80.0, 30, 2], [75.0, 22, 1]], [[20.0, 30, 2], [12.0, 38, 0]]]),
        "points": torch.tensor([[[80.0, 30, 1], [99.0, 90, 0]], [[20.0, 30, 1], [50.0, 90, 0]]]),
        "ignore_boxes": torch.tensor([[60.0, 50, 100, 90], [0.0, 0, 40, 10], [100.0, 0, 120, 10]]),
        "image_id": 7,
        "orig_size": (HEIGHT, WIDTH),
        "note": "ab",
    }


class LeftHalf(v2.Transform):
    """Crops to the left 64 px."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return inpt if type(inpt) is Tensor else functional.crop(inpt, 0, 0, HEIGHT, 64)


@pytest.mark.parametrize(
    "last", [v2.Identity(), v2.SanitizeBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=5)]
)
def test_a_crop_takes_an_objects_fields_with_it(last: Any) -> None:
    image = scene()[0]
    _, moved = augmented(v2.Compose([LeftHalf(), last]), image, full_target(), 0)
    assert moved["labels"].tolist() == [2]
    assert moved["boxes"].tolist() == [[10, 20, 30, 40]]
    assert isinstance(moved["masks"], EncodedMasks)
    assert moved["masks"].bitmaps().sum() == 400
    assert moved["area"].tolist() == [400]
    assert moved["iscrowd"].tolist() == [0]
    assert moved["weights"].tolist() == [2]
    assert moved["has_mask"].tolist() == [True]
    assert moved["names"] == ["left"]
    assert moved["scores"].tolist() == [0.2]
    assert moved["keypoints"].tolist() == [[[20, 30, 2], [12, 38, 0]]]
    assert moved["points"].tolist() == [[[20, 30, 1], [50, 90, 0]]]
    # Regions are filtered by themselves.
    assert moved["ignore_boxes"].tolist() == [[60, 50, 64, 90], [0, 0, 40, 10]]
    assert (moved["image_id"], moved["orig_size"], moved["note"]) == (7, (HEIGHT, WIDTH), "ab")


def test_flips_move_points_keypoints_and_regions_as_boxes() -> None:
    image = scene()[0]
    _, moved = augmented(v2.RandomHorizontalFlip(1.0), image, full_target(), 0)
    assert moved["points"][0].tolist() == [[WIDTH - 80, 30, 1], [WIDTH - 99, 90, 0]]
    assert moved["keypoints"][1].tolist() == [[WIDTH - 20, 30, 2], [WIDTH - 12, 38, 0]]
    assert moved["ignore_boxes"][1].tolist() == [WIDTH - 40, 0, WIDTH, 10]
    _, moved = augmented(v2.RandomVerticalFlip(1.0), image, full_target(), 0)
    assert moved["points"][0].tolist() == [[80, HEIGHT - 30, 1], [99, HEIGHT - 90, 0]]
    assert moved["masks"].bitmaps()[0].nonzero().amin(0).tolist() == [HEIGHT - 40, 70]


def test_resizing_scales_points() -> None:
    _, moved = augmented(v2.Resize((2 * HEIGHT, 3 * WIDTH)), scene()[0], full_target(), 0)
    assert moved["points"][0].tolist() == [[240, 60, 1], [297, 180, 0]]
    assert moved["keypoints"].shape == (2, 2, 3)


def test_points_that_leave_the_image_have_no_label() -> None:
    class TopLeft(v2.Transform):
        def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
            return inpt if type(inpt) is Tensor else functional.crop(inpt, 0, 0, 60, 95)

    _, moved = augmented(TopLeft(), scene()[0], full_target(), 0)
    assert moved["points"][..., 2].tolist() == [[1, -1], [1, -1]]
    assert moved["keypoints"].tolist() == full_target()["keypoints"].tolist()
    keypoints = full_target()
    keypoints["keypoints"][0, 1] = torch.tensor([75.0, 70.0, 2.0])
    _, moved = augmented(TopLeft(), scene()[0], keypoints, 0)
    assert moved["keypoints"][0, 1].tolist() == [0, 0, 0]


def test_a_rotation_takes_points_along() -> None:
    # By 180 degrees about the center each point (x, y) goes to (W - x, H - y).
    _, moved = augmented(v2.RandomRotation((180, 180)), scene()[0], full_target(), 0)
    expected = torch.tensor([[WIDTH - 80.0, HEIGHT - 30.0], [WIDTH - 99.0, HEIGHT - 90.0]])
    assert torch.allclose(moved["points"][0, :, :2], expected, atol=1.0)
    assert moved["masks"].shape == (2, HEIGHT, WIDTH)


def test_every_field_has_one_entry_per_object_whatever_the_transform_drops() -> None:
    jitter = v2.Compose(
        [v2.RandomIoUCrop(min_scale=0.2, trials=20), v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes()]
    )
    counts = set()
    for seed in range(40):
        _, moved = augmented(jitter, scene()[0], full_target(), seed)
        count = len(moved["boxes"])
        counts.add(count)
        for key in (
            "labels",
            "masks",
            "area",
            "iscrowd",
            "weights",
            "has_mask",
            "names",
            "scores",
            "keypoints",
            "points",
        ):
            assert len(moved[key]) == count, key
        names = {1: "right", 2: "left"}
        assert moved["names"] == [names[label] for label in moved["labels"].tolist()]
    assert {1, 2} <= counts
