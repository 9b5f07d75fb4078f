"""Checks of what a training loop hands the model, before anything is computed from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskloss.masks.encoded import EncodedMasks

Target = dict[str, Any]

#: How far a box may reach beyond the image, in px, for the rounding of annotations to two decimals.
_BORDER_TOLERANCE = 0.1


def check_targets(
    images: Sequence[Tensor],
    targets: Sequence[Target] | None,
    *,
    num_classes: int | None,
    has_masks: bool,
    has_keypoints: bool,
) -> None:
    """Raise on what torchvision accepts silently or reports as a failed kernel, naming image and field.

    Runs on the targets' own device, and asks it for one answer per batch.

    Args:
        images: N tensors (3, H, W), as the model takes them.
        targets: one dict per image: boxes (G, 4), xyxy in px of the image as given, labels (G,) int64 in
            [1, C), and masks and keypoints where the model has such branches.
        num_classes: C, background included; None where it cannot be known.
        has_masks: whether masks are needed.
        has_keypoints: whether keypoints are needed.

    Raises:
        TypeError: a field is no tensor, or of another dtype.
        ValueError: everything else: a field is missing or of another shape, counts differ, boxes are
            degenerate, not finite or outside the image, labels are out of range, masks are not of the image's
            size or hold values other than 0 and 1.
    """
    if targets is None:
        raise ValueError("targets are needed to compute losses, got None")
    if len(images) != len(targets):
        raise ValueError(f"got {len(images)} images but {len(targets)} targets")
    # What each value check found, (G,) bool, to be looked at together, once.
    violations: list[tuple[Tensor, str, Target]] = []
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        name = _image_name(index, target)
        _check_form(name, image, target, has_masks, has_keypoints)
        boxes, labels = target["boxes"], target["labels"]
        if len(boxes) == 0:
            continue
        height, width = image.shape[-2:]
        size = boxes.new_tensor([width, height, width, height], dtype=torch.float32)
        slack = _BORDER_TOLERANCE + torch.finfo(boxes.dtype).eps * size
        exact = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32))
        found = {
            "boxes: a box is not finite": ~exact.isfinite().all(1),
            "boxes: a box has no area, x2 > x1 and y2 > y1 are needed": (exact[:, 2:] <= exact[:, :2]).any(1),
            f"boxes: a box reaches outside the image of {height} x {width} (H x W)": (
                (exact < -slack) | (exact > size + slack)
            ).any(1),
            "labels: a label is below 1, and 0 is background": labels < 1,
        }
        if num_classes is not None:
            found[f"labels: a label is not below num_classes, {num_classes}"] = labels >= num_classes
        if has_masks and isinstance(target["masks"], Tensor) and target["masks"].dtype == torch.uint8:
            found["masks: a mask has values other than 0 and 1, use `masks > 0`"] = (
                target["masks"].flatten(1).amax(1) > 1
            )
        violations += [(violated, f"{name}, {what}", target) for what, violated in found.items()]
    if not violations:
        return
    # Masks may be on the host where boxes are on a GPU.
    device = violations[0][0].device
    verdicts = torch.stack([violated.any().to(device) for violated, _, _ in violations]).tolist()
    if any(verdicts):
        violated, message, target = violations[verdicts.index(True)]
        instance = int(violated.long().argmax())
        box, label = target["boxes"][instance].tolist(), int(target["labels"][instance])
        raise ValueError(f"{message} (instance {instance}: box {box}, label {label})")


def _check_form(name: str, image: Tensor, target: Target, has_masks: bool, has_keypoints: bool) -> None:
    """Check keys, types, dtypes, shapes and counts, which need no look at the values."""
    needed = ["boxes", "labels"] + ["masks"] * has_masks + ["keypoints"] * has_keypoints
    for field in needed:
        if field not in target:
            raise ValueError(f"{name}: the target has no {field}")
    boxes, labels = target["boxes"], target["labels"]
    for field, value in (("boxes", boxes), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}, {field}: expected a tensor, got {type(value).__name__}")
    if not boxes.is_floating_point():
        raise TypeError(f"{name}, boxes: expected a floating-point dtype, got {boxes.dtype}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}, boxes: expected shape (G, 4), got {tuple(boxes.shape)}")
    count = len(boxes)
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}, labels: expected torch.int64, got {labels.dtype}")
    if count == 0:
        # Without objects there is nothing to read, and users write the empty fields in many shapes.
        return
    if labels.shape != (count,):
        raise ValueError(
            f"{name}, labels: expected shape ({count},) for as many boxes, got {tuple(labels.shape)}"
        )
    if has_masks:
        _check_masks_form(name, image, target["masks"], count)
    if has_keypoints:
        keypoints = target["keypoints"]
        if not isinstance(keypoints, Tensor) or not keypoints.is_floating_point():
            raise TypeError(f"{name}, keypoints: expected a floating-point tensor")
        if keypoints.dim() != 3 or len(keypoints) != count or keypoints.shape[2] != 3:
            raise ValueError(
                f"{name}, keypoints: expected shape ({count}, number of keypoints, 3), got {tuple(keypoints.shape)}"
            )


def _check_masks_form(name: str, image: Tensor, masks: Any, count: int) -> None:
    if not isinstance(masks, Tensor | EncodedMasks):
        raise TypeError(f"{name}, masks: expected a tensor or EncodedMasks, got {type(masks).__name__}")
    if isinstance(masks, Tensor) and masks.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"{name}, masks: expected torch.bool, or torch.uint8 of 0 and 1, got {masks.dtype}")
    expected = (count, *image.shape[-2:])
    if tuple(masks.shape) != expected:
        raise ValueError(
            f"{name}, masks: expected shape {expected}, one mask of the image's size per box, "
            f"got {tuple(masks.shape)}"
        )


def _image_name(index: int, target: Target) -> str:
    image_id = target.get("image_id")
    if isinstance(image_id, Tensor) and image_id.numel() == 1:
        image_id = int(image_id)
    return f"image {index} of the batch" + ("" if image_id is None else f" (image_id {image_id})")
