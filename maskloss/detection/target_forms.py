"""Checks of the form of images and targets, which read no values: types, dtypes, shapes, counts and devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from maskloss.detection.model_inputs import ModelInputs
from maskloss.detection.target_errors import ImageName, Target, TargetTypeError, TargetValueError
from maskloss.detection.transform import is_resized_to_nothing
from maskloss.masks.encoded import EncodedMasks


def check_image_form(name: ImageName, image: Any, expected: ModelInputs) -> None:
    """Check the type, dtype and shape of an image.

    Raises:
        TypeError: it is not a float tensor.
        ValueError: it has another number of dimensions or channels, or would be resized to nothing.
    """
    if not isinstance(image, Tensor):
        raise TypeError(
            f"{name}: expected a float tensor (3, H, W) in [0, 1], got {type(image).__module__}."
            f"{type(image).__name__}; torchvision.transforms.v2.functional.to_image and to_dtype(..., scale=True) "
            "make one"
        )
    shape = tuple(image.shape)
    if image.dim() != 3 or 0 in shape:
        raise TargetValueError(f"{name}: expected a tensor (3, H, W), got shape {shape}")
    if not image.is_floating_point():
        raise TypeError(
            f"{name}: expected a float tensor in [0, 1], got {image.dtype}; "
            "torchvision.transforms.v2.functional.to_dtype(image, torch.float32, scale=True) makes one"
        )
    channels = expected.num_channels
    if channels is not None and shape[0] != channels:
        cause = ""
        if shape[2] == channels:
            cause = "; it is (H, W, 3), use image.permute(2, 0, 1)"
        elif shape[0] == 1:
            cause = "; it is gray, use image.expand(3, -1, -1)"
        elif (shape[0], channels) == (4, 3):
            cause = "; it has an alpha channel, use image[:3]"
        raise ValueError(f"{name}: expected ({channels}, H, W), got shape {shape}{cause}")
    if (
        expected.min_size is not None
        and expected.max_size is not None
        and is_resized_to_nothing(shape[1], shape[2], expected.min_size, expected.max_size)
    ):
        raise ValueError(
            f"{name}: the image of {shape[1]} x {shape[2]} px (H x W) would be resized to at most "
            f"{expected.max_size} px, with a shorter side of 0 px; cut it into parts or raise max_size"
        )


def check_target_form(name: ImageName, image: Tensor, target: Target, expected: ModelInputs) -> None:
    """Check a target's keys, and their types, dtypes, shapes, counts and devices.

    Raises:
        TypeError: a field is not a tensor, or has the wrong dtype.
        ValueError: a field is missing, has the wrong shape, or is on another device than the image.
    """
    if "boxes" not in target:
        raise ValueError(f"{name}: the target has no boxes")
    boxes = target["boxes"]
    # As in torchvision, the boxes are checked before other fields.
    if not isinstance(boxes, Tensor):
        raise TargetTypeError(f"{name}, boxes: expected a tensor, got {type(boxes).__name__}")
    # Without objects, users pass empty fields of many shapes; they hold no values.
    is_empty = boxes.numel() == 0 and boxes.shape[:1] in ((), (0,))
    if not is_empty and (boxes.dim() != 2 or boxes.shape[1] != 4):
        raise TargetValueError(f"{name}, boxes: expected shape (G, 4), got {tuple(boxes.shape)}")
    masks_needed = expected.has_masks and not {"has_mask", "points"} & set(target)
    needed = ["labels"] + ["masks"] * masks_needed + ["keypoints"] * expected.has_keypoints
    for field in needed:
        if field not in target:
            # torchvision finds boxes without area first, and raises AssertionError for them.
            way_out = ""
            if field == "masks":
                way_out = "; for objects without masks, pass has_mask=torch.zeros(G, dtype=torch.bool)"
            raise TargetValueError(f"{name}: the target has no {field}{way_out}")
    labels = target["labels"]
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}, labels: expected a tensor, got {type(labels).__name__}")
    if boxes.is_complex() or boxes.dtype == torch.bool:
        raise TypeError(f"{name}, boxes: expected a floating-point or integer dtype, got {boxes.dtype}")
    if isinstance(boxes, BoundingBoxes) and boxes.format != BoundingBoxFormat.XYXY:
        raise ValueError(
            f"{name}, boxes: BoundingBoxes have the format {boxes.format.value}, but the model needs XYXY; "
            'torchvision.transforms.v2.ConvertBoundingBoxFormat("XYXY") converts them'
        )
    if "ignore_boxes" in target:
        _check_ignore_boxes_form(name, target["ignore_boxes"])
    if is_empty:
        _check_no_objects(name, target, expected)
        return
    count = len(boxes)
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}, labels: expected torch.int64, got {labels.dtype}")
    # Other fields are moved to the model's device.
    for field in ["labels"] + ["keypoints"] * expected.has_keypoints:
        device = getattr(target[field], "device", image.device)
        if device != image.device:
            raise ValueError(
                f"{name}, {field}: is on {device}, but the image is on {image.device}; move the target's tensors to "
                "the image's device"
            )
    if labels.shape != (count,):
        raise ValueError(
            f"{name}, labels: expected shape ({count},), one label per box, got {tuple(labels.shape)}"
        )
    if "weights" in target:
        _check_weights_form(name, target["weights"], count)
    if "points" in target:
        _check_points_form(name, target["points"], count)
    if expected.has_masks and "masks" in target:
        _check_masks_form(name, image, target["masks"], count)
    if "has_mask" in target:
        has_mask = target["has_mask"]
        if not isinstance(has_mask, Tensor) or has_mask.dtype != torch.bool or has_mask.shape != (count,):
            found = type(has_mask).__name__
            if isinstance(has_mask, Tensor):
                found = f"{has_mask.dtype} {tuple(has_mask.shape)}"
            raise TypeError(
                f"{name}, has_mask: expected a bool tensor ({count},), one value per box, got {found}"
            )
    if expected.has_keypoints:
        keypoints = target["keypoints"]
        if not isinstance(keypoints, Tensor) or not keypoints.is_floating_point():
            raise TypeError(f"{name}, keypoints: expected a floating-point tensor")
        if keypoints.dim() != 3 or len(keypoints) != count or keypoints.shape[2] != 3:
            raise ValueError(
                f"{name}, keypoints: expected shape ({count}, number of keypoints, 3), got {tuple(keypoints.shape)}"
            )
        if expected.num_keypoints is not None and keypoints.shape[1] != expected.num_keypoints:
            raise ValueError(
                f"{name}, keypoints: expected shape ({count}, {expected.num_keypoints}, 3), as many keypoints per "
                f"object as the model predicts, got {tuple(keypoints.shape)}"
            )


def _check_no_objects(name: ImageName, target: Target, expected: ModelInputs) -> None:
    """Check that a target without boxes holds no object, which would be left out silently.

    Zeros are accepted: background labels and empty masks are common placeholders in images without objects. Values on a
    GPU are not read, because that would synchronize.
    """
    fields = ["labels", "has_mask", "weights", "points"]
    fields += ["masks"] * expected.has_masks + ["keypoints"] * expected.has_keypoints
    for field in fields:
        value = target.get(field, ())
        if isinstance(value, Tensor):
            holds_values = value.numel() > 0 and value.device.type == "cpu" and bool(value.any())
        else:
            holds_values = hasattr(value, "__len__") and len(value) > 0
        if holds_values:
            found = tuple(value.shape) if hasattr(value, "shape") else (len(value),)
            raise ValueError(
                f"{name}, {field}: got shape {found}, but the target has no boxes; give each object its box, or pass "
                "empty tensors for an image without objects"
            )


def _check_ignore_boxes_form(name: ImageName, boxes: Any) -> None:
    if not isinstance(boxes, Tensor) or boxes.is_complex() or boxes.dtype == torch.bool:
        raise TypeError(f"{name}, ignore_boxes: expected a tensor (I, 4), got {type(boxes).__name__}")
    if isinstance(boxes, BoundingBoxes) and boxes.format != BoundingBoxFormat.XYXY:
        raise ValueError(
            f"{name}, ignore_boxes: BoundingBoxes have the format {boxes.format.value}, but the model needs XYXY; "
            'torchvision.transforms.v2.ConvertBoundingBoxFormat("XYXY") converts them'
        )
    if boxes.numel() and (boxes.dim() != 2 or boxes.shape[1] != 4):
        raise ValueError(f"{name}, ignore_boxes: expected shape (I, 4), got {tuple(boxes.shape)}")


def _check_weights_form(name: ImageName, weights: Any, count: int) -> None:
    if not isinstance(weights, Tensor) or weights.is_complex() or weights.dtype == torch.bool:
        found = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"{name}, weights: expected a float tensor ({count},), one per box, got {found}")
    if weights.shape != (count,):
        raise ValueError(
            f"{name}, weights: expected shape ({count},), one per box, got {tuple(weights.shape)}"
        )


def _check_points_form(name: ImageName, points: Any, count: int) -> None:
    if not isinstance(points, Tensor) or points.is_complex() or points.dtype == torch.bool:
        found = points.dtype if isinstance(points, Tensor) else type(points).__name__
        raise TypeError(f"{name}, points: expected a float tensor ({count}, K, 3), got {found}")
    if points.dim() != 3 or len(points) != count or points.shape[2] != 3:
        raise ValueError(
            f"{name}, points: expected shape ({count}, K, 3), x, y and label of K points per box, got "
            f"{tuple(points.shape)}"
        )


def _check_masks_form(name: ImageName, image: Tensor, masks: Any, count: int) -> None:
    if not isinstance(masks, Tensor | EncodedMasks):
        makes = {
            "list": "torch.stack(masks)",
            "tuple": "torch.stack(masks)",
            "ndarray": "torch.from_numpy(masks)",
        }
        found = type(masks).__name__
        way_out = f"; {makes[found]} makes a tensor" if found in makes else ""
        raise TypeError(f"{name}, masks: expected a tensor or EncodedMasks, got {found}{way_out}")
    if isinstance(masks, Tensor) and masks.is_complex():
        raise TypeError(f"{name}, masks: expected a tensor of 0 and 1, got {masks.dtype}")
    if isinstance(masks, Tensor) and masks.layout != torch.strided:
        raise TypeError(
            f"{name}, masks: expected a dense tensor, got {masks.layout}; masks.to_dense() makes one"
        )
    expected = (count, *image.shape[-2:])
    if tuple(masks.shape) != expected:
        raise ValueError(
            f"{name}, masks: expected shape {expected}, one mask per box in the image's size, "
            f"got {tuple(masks.shape)}{_shape_hint(tuple(masks.shape), expected)}"
        )


def _shape_hint(shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Return how to bring masks of a frequent wrong shape into the expected one, (G, H, W)."""
    count, height, width = expected
    if shape == (count, 1, height, width):
        return "; masks.squeeze(1) removes the axis of the channel"
    if shape == (height, width, count):
        return "; masks.permute(2, 0, 1) puts the objects first"
    if shape == (height, width):
        return "; if its pixels are numbers of objects, torch.stack([masks == n for n in numbers]) makes their masks"
    return ""


def in_plain_form(targets: Sequence[Target], images: Sequence[Tensor]) -> list[Target]:
    """Return targets in the form that torchvision's code needs.

    Targets that have this form already are returned unchanged. Others are images without objects, whose fields users
    pass in many shapes, such as `torch.tensor([])`, and targets with `has_mask` or `points` but without masks.

    Args:
        targets: one dict per image, checked by `check_inputs`.
        images: N tensors (3, H, W).

    Example:
        >>> empty = {"boxes": torch.tensor([]), "labels": torch.tensor([])}
        >>> in_plain_form([empty], [torch.rand(3, 8, 8)])[0]["boxes"].shape
        torch.Size([0, 4])
    """
    plain = []
    for image, target in zip(images, targets, strict=True):
        boxes = target["boxes"]
        height, width = image.shape[-2:]
        changes: Target = {}
        if len(boxes) == 0:
            dtype = boxes.dtype if boxes.is_floating_point() else torch.float32
            changes["boxes"] = boxes.new_zeros((0, 4), dtype=dtype)
            changes["labels"] = target["labels"].new_zeros(0, dtype=torch.int64)
            if "masks" in target and not isinstance(target["masks"], EncodedMasks):
                changes["masks"] = _empty(target, "masks", (height, width), torch.uint8)
            if "has_mask" in target:
                changes["has_mask"] = boxes.new_zeros(0, dtype=torch.bool)
            if "weights" in target:
                changes["weights"] = boxes.new_zeros(0, dtype=torch.float32)
            for field in {"keypoints", "points"} & set(target):
                shape: tuple[int, ...] = tuple(getattr(target[field], "shape", ()))
                count = shape[1] if len(shape) == 3 else 0
                changes[field] = _empty(target, field, (count, 3), torch.float32)
        if ("has_mask" in target or "points" in target) and "masks" not in target:
            changes["masks"] = EncodedMasks([None] * len(boxes), height, width)
        if "ignore_boxes" in target and target["ignore_boxes"].numel() == 0:
            changes["ignore_boxes"] = target["ignore_boxes"].new_zeros((0, 4), dtype=torch.float32)
        plain.append({**target, **changes} if changes else target)
    return plain


def _empty(target: Target, field: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an empty tensor (0, *shape) on the device of a field, which may also be an empty list."""
    like = target[field] if isinstance(target[field], Tensor) else target["labels"]
    return torch.zeros((0, *shape), dtype=dtype, device=like.device)
