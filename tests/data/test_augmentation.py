"""maskloss/data/augmentation.py: images, boxes and masks move together, and masks stay encoded if possible."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from maskloss.data.augmentation import augmentation, augmented
from maskloss.masks.encoded import EncodedMasks
from tests.data.scenes import (
    BOXES,
    HEIGHT,
    LARGE_SCALE_JITTER,
    WIDTH,
    CropTo,
    extents,
    full_target,
    scene,
    squares,
    two_squares,
)


def changed(transforms: Any, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    return augmented(transforms, *scene(), seed)


def test_a_flip_moves_the_image_the_boxes_and_the_masks_together() -> None:
    image, target = changed(augmentation(horizontal_flip=1.0, photometric_distortion=0.0))
    assert torch.equal(image, scene()[0].flip(-1))
    assert target["boxes"].tolist() == [[WIDTH - x2, y1, WIDTH - x1, y2] for x1, y1, x2, y2 in BOXES]
    assert target["masks"].polygons(0)[0].tolist() == [[118, 20], [78, 20], [78, 60], [118, 60]]
    assert torch.equal(extents(target["masks"].bitmaps()[[0, 2]]), target["boxes"][[0, 2]])
    assert target["labels"].tolist() == [1, 2, 3]
    assert target["image_id"] == 7


def test_a_probability_of_0_changes_nothing() -> None:
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


def test_objects_outside_the_image_are_dropped_from_every_field() -> None:
    class LeftPart(v2.Transform):
        def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
            return functional.crop(inpt, 0, 0, HEIGHT, 56)

    image, target = changed(LeftPart())
    assert image.shape == (3, HEIGHT, 56)
    assert target["boxes"].tolist() == [BOXES[0], [30, 50, 56, 80]]
    assert target["labels"].tolist() == [1, 3]
    assert torch.equal(extents(target["masks"].bitmaps()), target["boxes"])


def test_the_callers_target_is_not_modified() -> None:
    image, target = scene()
    augmented(v2.RandomHorizontalFlip(1.0), image, target, 0)
    assert target["boxes"].tolist() == BOXES
    assert torch.equal(target["masks"].bitmaps(), scene()[1]["masks"].bitmaps())


def test_an_image_without_objects_has_empty_fields() -> None:
    image, target = scene()
    target.update(
        boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), masks=target["masks"][[]]
    )
    _, moved = augmented(LARGE_SCALE_JITTER, image, target, 0)
    assert moved["boxes"].shape == (0, 4)
    assert moved["masks"].shape == (0, 128, 128)


class LeftPart(v2.Transform):
    """Crop to the columns 0 to 57."""

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


# Fields that belong to an object follow it.


class LeftHalf(v2.Transform):
    """Crop to the left 64 px."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return inpt if type(inpt) is Tensor else functional.crop(inpt, 0, 0, HEIGHT, 64)


@pytest.mark.parametrize(
    "last", [v2.Identity(), v2.SanitizeBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=5)]
)
def test_a_crop_selects_every_field_of_an_object(last: Any) -> None:
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
    # Regions are filtered independently of the objects.
    assert moved["ignore_boxes"].tolist() == [[60, 50, 64, 90], [0, 0, 40, 10]]
    assert (moved["image_id"], moved["orig_size"], moved["note"]) == (7, (HEIGHT, WIDTH), "ab")


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


# The formats and types of v2 must not reach the objects' fields.


def test_has_mask_marks_the_objects_without_a_mask_among_bitmaps() -> None:
    masks = EncodedMasks([squares((10, 10)).polygons(0)[0].reshape(1, -1).tolist(), None], 100, 100)
    _, moved = augmented(v2.RandomRotation((20, 20)), *two_squares(masks=masks), 0)
    assert moved["has_mask"].tolist() == [True, False]
    assert moved["masks"][1].sum() == 0
    both = two_squares(masks=masks, has_mask=torch.tensor([False, True]))
    _, moved = augmented(v2.RandomRotation((20, 20)), *both, 0)
    assert moved["has_mask"].tolist() == [False, False]
    # The object with a mask is cropped away; the remaining one has none.
    right = v2.Compose([v2.RandomRotation((0.1, 0.1)), CropTo(40, 40, 60, 60), v2.SanitizeBoundingBoxes()])
    _, moved = augmented(right, *two_squares(masks=masks), 0)
    assert moved["has_mask"].tolist() == [False]


FORMATS = {
    "xywh at the end": [v2.ConvertBoundingBoxFormat("XYWH")],
    "cxcywh at the end": [v2.ConvertBoundingBoxFormat("CXCYWH")],
    "xywh, then a flip and back": [v2.ConvertBoundingBoxFormat("XYWH"), v2.RandomHorizontalFlip(0.0)],
    "pure tensors": [v2.ToPureTensor()],
    "floats, then pure tensors": [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()],
    "nothing": [v2.Identity()],
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("first", [v2.Identity(), v2.RandomRotation((180, 180)), CropTo(0, 0, 50, 50)])
def test_boxes_come_back_as_xyxy_and_all_entries_plain(name: str, first: v2.Transform) -> None:
    extra = {
        "keypoints": torch.tensor([[[20.0, 20, 2]], [[70.0, 70, 2]]]),
        "ignore_boxes": torch.tensor([[0.0, 0, 10, 10]]),
    }
    image, expected = augmented(first, *two_squares(**extra), 0)
    pixels, moved = augmented(v2.Compose([first, *FORMATS[name]]), *two_squares(**extra), 0)
    assert pixels.shape == image.shape
    assert torch.allclose(moved["boxes"], expected["boxes"], atol=1e-4)
    assert moved["labels"].tolist() == expected["labels"].tolist()
    for key in ("boxes", "labels", "keypoints", "ignore_boxes"):
        assert type(moved[key]) is Tensor, key
        assert torch.allclose(moved[key], expected[key], atol=1e-4), key
    assert type(moved["masks"]) is type(expected["masks"])
    assert len(moved["masks"]) == len(moved["boxes"])


def test_plain_boxes_in_another_format_are_refused() -> None:
    transforms = v2.Compose([v2.ConvertBoundingBoxFormat("XYWH"), v2.ToPureTensor()])
    with pytest.raises(ValueError, match="not xyxy: leave ConvertBoundingBoxFormat"):
        augmented(transforms, *two_squares(), 0)


@pytest.mark.parametrize("format", ["XYWH", "CXCYWH", "XYXY"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_bounding_boxes_of_any_format_are_read(format: str, dtype: torch.dtype) -> None:
    image, target = two_squares()
    xyxy = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(100, 100))
    given = functional.convert_bounding_box_format(xyxy, new_format=format)
    target["boxes"] = tv_tensors.wrap(given.as_subclass(Tensor).to(dtype), like=given)
    _, moved = augmented(v2.Resize((50, 25)), image, target, 0)
    assert moved["boxes"].tolist() == [[2.5, 5, 7.5, 15], [15, 30, 20, 40]]
    assert type(moved["boxes"]) is Tensor


def test_rotated_boxes_are_refused() -> None:
    image, target = two_squares()
    target["boxes"] = tv_tensors.BoundingBoxes(torch.rand(2, 5), format="XYWHR", canvas_size=(100, 100))
    with pytest.raises(ValueError, match="boxes are rotated"):
        augmented(v2.Identity(), image, target, 0)


# Points.


def test_the_border_is_inside_the_image() -> None:
    keypoints = torch.tensor(
        [[[0.0, 15, 2], [20, 0, 1], [100, 100, 2]], [[70, 100, 2], [0, 0, 2], [100, 0, 1]]]
    )
    _, moved = augmented(v2.Identity(), *two_squares(keypoints=keypoints, points=keypoints - 1), 0)
    assert torch.equal(moved["keypoints"], keypoints)
    assert moved["points"][..., 2].tolist() == [[-1, -1, 1], [1, -1, -1]]  # Of x or y below 0.
    _, moved = augmented(v2.RandomHorizontalFlip(1.0), *two_squares(keypoints=keypoints), 0)
    assert moved["keypoints"][0].tolist() == [[100, 15, 2], [80, 0, 1], [0, 100, 2]]


def test_keypoints_that_are_not_labeled_stay_at_0() -> None:
    # COCO: v = 0 means not labeled, and then x = y = 0.
    keypoints = torch.tensor([[[0.0, 0, 0], [20, 20, 2]], [[70.0, 70, 2], [0, 0, 0]]])
    points = torch.tensor([[[0.0, 0, 0]], [[70.0, 70, 1]]])
    _, moved = augmented(v2.RandomHorizontalFlip(1.0), *two_squares(keypoints=keypoints, points=points), 0)
    assert moved["keypoints"].tolist() == [[[0, 0, 0], [80, 20, 2]], [[30, 70, 2], [0, 0, 0]]]
    assert moved["points"].tolist() == [[[100, 0, 0]], [[30, 70, 1]]]
    cut = v2.Compose([CropTo(50, 50, 50, 50), v2.SanitizeBoundingBoxes()])
    _, moved = augmented(cut, *two_squares(keypoints=keypoints), 0)
    assert moved["keypoints"].tolist() == [[[20, 20, 2], [0, 0, 0]]]


@pytest.mark.parametrize("key", ["keypoints", "points"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
def test_points_are_not_rounded(key: str, dtype: torch.dtype) -> None:
    given = torch.tensor([[[75, 25, 1]], [[61, 99, 1]]], dtype=dtype)
    _, moved = augmented(v2.Resize((50, 50)), *two_squares(**{key: given}), 0)
    assert moved[key].tolist() == [[[37.5, 12.5, 1]], [[30.5, 49.5, 1]]]
    assert moved[key].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_keypoints_without_visibility_move() -> None:
    given = torch.tensor([[[20.0, 20], [10, 30]], [[70.0, 70], [60, 80]]])
    _, moved = augmented(v2.RandomHorizontalFlip(1.0), *two_squares(keypoints=given), 0)
    assert moved["keypoints"].tolist() == [[[80, 20], [90, 30]], [[30, 70], [40, 80]]]
    cut = v2.Compose([CropTo(50, 50, 50, 50), v2.SanitizeBoundingBoxes()])
    _, moved = augmented(cut, *two_squares(keypoints=given), 0)
    assert moved["keypoints"].tolist() == [[[20, 20], [10, 30]]]


@pytest.mark.parametrize("key", ["keypoints", "landmarks"])
def test_key_points_of_v2_move_as_v2_moves_them(key: str) -> None:
    data = torch.tensor([[[20.0, 20], [10, 30]], [[70.0, 70], [60, 80]]])
    given = tv_tensors.KeyPoints(data, canvas_size=(100, 100))
    expected = functional.horizontal_flip(given).as_subclass(Tensor)
    _, moved = augmented(v2.RandomHorizontalFlip(1.0), *two_squares(**{key: given}), 0)
    assert torch.equal(moved[key], expected)
    assert type(moved[key]) is Tensor
    cut = v2.Compose([CropTo(50, 50, 50, 50), v2.SanitizeBoundingBoxes()])
    _, moved = augmented(cut, *two_squares(**{key: given}), 0)
    assert moved[key].tolist() == [[[20, 20], [10, 30]]]


# Objects dropped by various transforms and functions.


def of_both() -> dict[str, Any]:
    return {
        "area": torch.tensor([400.0, 401.0]),
        "iscrowd": torch.tensor([0, 1]),
        "names": ["first", "second"],
        "scores": np.array([0.1, 0.2]),
        "keypoints": torch.tensor([[[20.0, 20, 2]], [[70.0, 70, 2]]]),
    }


def select_second(image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    keep = target["boxes"][:, 2] > target["boxes"][:, 0]
    return image, {**target, **{key: target[key][keep] for key in ("boxes", "labels", "masks")}}


def select_second_by_pixels(image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    keep = target["masks"].sum(dim=(1, 2)) > 100
    return image, {**target, **{key: target[key][keep] for key in ("boxes", "labels", "masks")}}


def select_second_everywhere(image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    return image, {
        key: [value[1]]
        if isinstance(value, list)
        else value[[1]]
        if isinstance(value, Tensor | np.ndarray)
        else value
        for key, value in target.items()
    }


DROPPING = {
    "labels by default": v2.SanitizeBoundingBoxes(),
    "no labels": v2.SanitizeBoundingBoxes(labels_getter=None),
    "labels and area": v2.SanitizeBoundingBoxes(
        labels_getter=lambda sample: (sample[1]["labels"], sample[1]["area"])
    ),
    "area alone": v2.SanitizeBoundingBoxes(labels_getter=lambda sample: sample[1]["area"]),
    "labels, then none": v2.Compose(
        [v2.SanitizeBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=None)]
    ),
    "nobody": v2.Identity(),
    "pure tensors": v2.Compose([v2.SanitizeBoundingBoxes(labels_getter=None), v2.ToPureTensor()]),
    "a function": select_second,
    "a function of pixels": select_second_by_pixels,
    "a function of every entry": select_second_everywhere,
}
FIRST = {
    "crop": CropTo(50, 50, 50, 50),
    "in pixels": v2.Compose([v2.RandomRotation((0.01, 0.01)), CropTo(50, 50, 50, 50)]),
}


@pytest.mark.parametrize("dropping", DROPPING)
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("kind", ["encoded", "dense", "bool", "none"])
def test_every_field_has_the_remaining_objects(dropping: str, first: str, kind: str) -> None:
    if kind == "none" and dropping == "a function of pixels":
        pytest.skip("there are no pixels")
    transforms = v2.Compose([FIRST[first], DROPPING[dropping]])
    image, target = two_squares(**of_both())
    if kind == "none":
        del target["masks"]
    elif kind != "encoded":
        target["masks"] = target["masks"].bitmaps().to(torch.bool if kind == "bool" else torch.uint8)
    _, moved = augmented(transforms, image, target, 0)
    assert moved["labels"].tolist() == [2]
    assert torch.allclose(moved["boxes"], torch.tensor([[10.0, 10, 30, 30]]), atol=0.1)
    assert moved["area"].tolist() == [401]
    assert moved["iscrowd"].tolist() == [1]
    assert list(moved["names"]) == ["second"]
    assert moved["scores"].tolist() == [0.2]
    assert torch.allclose(moved["keypoints"], torch.tensor([[[20.0, 20, 2]]]), atol=0.1)
    if kind == "none":
        assert "masks" not in moved
        assert "has_mask" not in moved
        return
    masks = moved["masks"] if isinstance(moved["masks"], Tensor) else moved["masks"].bitmaps()
    assert masks.shape == (1, 50, 50)
    assert masks[0, 12:28, 12:28].all()
    assert 380 <= masks.sum() <= 420
    if kind == "encoded":
        assert isinstance(moved["masks"], EncodedMasks) == (
            first == "crop" and dropping != "a function of pixels"
        )
    else:
        assert moved["masks"].dtype == (torch.bool if kind == "bool" else torch.uint8)


def test_labels_that_only_one_of_two_transforms_selected_are_selected_again() -> None:
    # The first crop drops the second object, and the second crop drops the first one.
    squares_ = {
        "masks": squares((10, 10), (60, 60), (10, 60)),
        "boxes": torch.tensor([[10.0, 10, 30, 30], [60.0, 60, 80, 80], [10.0, 60, 30, 80]]),
        "labels": torch.tensor([1, 2, 3]),
    }
    transforms = v2.Compose(
        [
            CropTo(0, 0, 100, 50),
            v2.SanitizeBoundingBoxes(),
            CropTo(50, 0, 50, 50),
            v2.SanitizeBoundingBoxes(labels_getter=None),
        ]
    )
    _, moved = augmented(transforms, *two_squares(**squares_), 0)
    assert moved["labels"].tolist() == [3]
    assert moved["boxes"].tolist() == [[10, 10, 30, 30]]
    assert moved["masks"].bitmaps().sum() == 400


def test_a_function_that_drops_objects_only_from_the_boxes_is_an_error() -> None:
    def boxes_alone(image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        return image, {**target, "boxes": target["boxes"][1:]}

    with pytest.raises(ValueError, match=r"kept 1 of 2 boxes, but not of labels: .*SanitizeBoundingBoxes"):
        augmented(boxes_alone, *two_squares(), 0)


def test_fields_that_do_not_belong_to_objects_do_not_change() -> None:
    entries = {
        "meta": {"a": 1, "b": 2},
        "orig_size": (100, 100),
        "image_id": torch.tensor([3, 4]),
        "path": "ab",
    }
    cut = v2.Compose([CropTo(50, 50, 50, 50), v2.SanitizeBoundingBoxes()])
    _, moved = augmented(cut, *two_squares(**entries), 0)
    assert moved["meta"] == {"a": 1, "b": 2}
    assert moved["orig_size"] == (100, 100)
    assert moved["image_id"].tolist() == [3, 4]
    assert moved["path"] == "ab"


@pytest.mark.parametrize("kind", ["encoded", "dense", "none"])
@pytest.mark.parametrize(
    "transforms", [v2.RandomRotation((20, 20)), v2.SanitizeBoundingBoxes(), v2.Resize((50, 50))]
)
def test_an_image_without_objects_passes(kind: str, transforms: v2.Transform) -> None:
    image, _ = two_squares()
    target: dict[str, Any] = {"boxes": torch.tensor([]), "labels": torch.tensor([], dtype=torch.int64)}
    if kind != "none":
        target["masks"] = EncodedMasks([], 100, 100) if kind == "encoded" else torch.zeros(0, 100, 100)
    target["keypoints"] = torch.zeros(0, 17, 3)
    pixels, moved = augmented(transforms, image, target, 0)
    assert moved["boxes"].shape == (0, 4)
    assert moved["keypoints"].shape[0] == 0
    if kind != "none":
        assert moved["masks"].shape == (0, *pixels.shape[-2:])


WRONG = [
    ({"masks": [[1.0, 2, 3, 4, 5, 6]]}, TypeError, "masks are a list"),
    (
        {"masks": torch.zeros(2, 50, 50)},
        ValueError,
        r"masks have the shape \(2, 50, 50\), not \(2, 100, 100\)",
    ),
    ({"masks": squares((1, 1))}, ValueError, "masks have the shape"),
    ({"boxes": torch.zeros(2, 5)}, ValueError, r"boxes have the shape \(2, 5\)"),
    ({"boxes": [[1, 2, 3, 4]]}, TypeError, "boxes are a list"),
    (
        {"keypoints": torch.zeros(3, 4, 3)},
        ValueError,
        r"keypoints have the shape \(3, 4, 3\), not \(2, K, 3\)",
    ),
    ({"points": torch.zeros(2, 3)}, ValueError, "points have the shape"),
    ({"points": [[1.0, 2, 1]]}, TypeError, "points are a list"),
]


@pytest.mark.parametrize(("entries", "error", "message"), WRONG)
def test_fields_of_wrong_type_or_shape_are_named(
    entries: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        augmented(v2.Identity(), *two_squares(**entries), 0)


def test_an_image_of_another_type_is_named() -> None:
    with pytest.raises(TypeError, match="pil_to_tensor"):
        augmented(v2.Identity(), PIL.Image.new("RGB", (100, 100)), two_squares()[1], 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"not \(3, H, W\)"):
        augmented(v2.Identity(), torch.zeros(100, 100), two_squares()[1], 0)
    with pytest.raises(ValueError, match="the target has no boxes"):
        augmented(v2.Identity(), two_squares()[0], {"labels": torch.tensor([1])}, 0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("limits", [(0.4, 0.9), (1.2, 3.0), (1.0, 1.0)])
def test_scale_jitter_moves_encoded_masks_as_v2_moves_bitmaps(limits: tuple[float, float], seed: int) -> None:
    transforms = augmentation(horizontal_flip=0.0, photometric_distortion=0.0, scale_jitter=limits)
    image, target = changed(transforms, seed)
    original, given = scene()
    dense_image, dense = augmented(transforms, original, {**given, "masks": given["masks"].bitmaps()}, seed)
    assert torch.equal(image, dense_image)
    assert torch.equal(target["boxes"], dense["boxes"])
    assert torch.equal(target["labels"], dense["labels"])
    # pycocotools draws the edge of a polygon that leaves the image a pixel off here and there.
    assert (target["masks"].bitmaps() != dense["masks"]).float().mean() < 0.01
    # Objects are as much larger, relative to the image, as the image is smaller.
    height, width = image.shape[-2:]
    assert limits[0] * 0.97 <= HEIGHT / height <= limits[1] * 1.03
    assert width == pytest.approx(WIDTH * height / HEIGHT, abs=2)
    if limits[1] < 1:
        # The whole image is there, in a gray frame.
        frame = (image == 124).all(dim=0).sum()
        assert frame >= height * width - HEIGHT * WIDTH
        assert len(target["boxes"]) == len(BOXES)
    if limits == (1.0, 1.0):
        assert torch.equal(image, original)


def test_scale_jitter_repeats_with_its_seed_and_differs_with_another() -> None:
    transforms = augmentation(horizontal_flip=0.0, photometric_distortion=0.0, scale_jitter=(0.5, 2.0))
    first, again, other = (changed(transforms, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape


def test_only_the_generator_whose_state_is_restored_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.manual_seed also seeds the GPU's generator, which the training draws from.
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds all generators"))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the GPUs"))
    image, target = (
        torch.rand(3, 8, 8),
        {
            "boxes": torch.tensor([[1.0, 1, 5, 5]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, 8, 8, dtype=torch.uint8),
        },
    )
    before = torch.get_rng_state()
    flip = v2.RandomHorizontalFlip(0.5)
    flipped = [augmented(flip, image, target, seed)[1]["boxes"][0, 0].item() for seed in range(40)]
    assert set(flipped) == {1.0, 3.0}
    assert flipped == [augmented(flip, image, target, seed)[1]["boxes"][0, 0].item() for seed in range(40)]
    assert torch.equal(torch.get_rng_state(), before)
