"""Checks of the images and targets that a training loop hands to the model, before anything is computed from them.

What stock torchvision trains on rightly passes. What it trains on wrongly without a word, or reports as a failed
kernel, raises an error that names the image and the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from maskloss.masks.encoded import EncodedMasks

Target = dict[str, Any]

#: How far a box may reach beyond the image without a warning, in px: annotations are rounded to two decimals.
_BORDER_TOLERANCE = 0.1
#: Range of pixels that are about in [0, 1]: noise and color jitter may leave it, images in 0..255 and images that
#: were normalized before the model normalizes them do not stay inside.
_PIXEL_RANGE = (-1.0, 2.0)
#: How far the sides of a box may be from those of its object's mask to fit, in px and as a part of the mask's side.
_FIT_PIXELS, _FIT_SHARE = 2.0, 0.05


class TargetValueError(ValueError, AssertionError):
    """An input has a wrong value; stock torchvision raises an AssertionError there, which this is too."""


class TargetTypeError(TypeError, AssertionError):
    """An input is of a wrong type; stock torchvision raises an AssertionError there, which this is too."""


@dataclass(frozen=True)
class ModelInputs:
    """What a model expects of its images and targets.

    Attributes:
        num_classes: C, background included; None where it cannot be known.
        has_masks: whether targets need masks.
        has_keypoints: whether targets need keypoints.
        num_channels: of the images; None where it cannot be known.
        unit_range: whether the model normalizes pixels in [0, 1].
        min_size: shorter side in px that images are resized to, the smallest of several; None where it cannot be
            known.
        max_size: longest side in px that images are resized to.
    """

    num_classes: int | None = None
    has_masks: bool = False
    has_keypoints: bool = False
    num_channels: int | None = None
    unit_range: bool = False
    min_size: int | None = None
    max_size: int | None = None


@dataclass(frozen=True)
class _Finding:
    """What one check of the values found, still on the device.

    Attributes:
        found: (G,) bool for the objects of an image, or a scalar for the image.
        message: of the error, or of the warning.
        index: which image of the batch.
        fatal: whether it is an error; a warning otherwise.
        error: the type to raise.
    """

    found: Tensor
    message: str
    index: int
    fatal: bool = True
    error: type[Exception] = ValueError


def check_inputs(
    images: Sequence[Tensor],
    targets: Sequence[Target] | None,
    expected: ModelInputs,
    *,
    check_box_format: bool = False,
) -> str | None:
    """Raise an error if the images or targets of a training batch cannot be meant.

    The values are checked on the targets' own device, which is synchronized with once for the batch.

    Args:
        images: N float tensors (3, H, W), as the model takes them.
        targets: one dict per image: boxes (G, 4), xyxy in px of the image as given, labels (G,) int64 in
            [1, C), and masks and keypoints where the model has such branches; where wanted also has_mask (G,)
            and ignore_boxes (I, 4). Without objects the fields may be empty in any shape.
        expected: what the model needs.
        check_box_format: whether to compare boxes with the masks, to find boxes in another format than xyxy in px.
            This costs far more than the other checks.

    Returns:
        A warning about boxes that reach outside of their image; None if there is none.

    Raises:
        TypeError: an image or a field is no tensor, or of another dtype.
        ValueError: everything else: a field is missing or of another shape, counts differ, boxes are
            degenerate, not finite or in another format, labels are out of range, masks are not of the image's
            size or hold values other than 0 and 1, pixels are not in about [0, 1].
            Both are AssertionErrors too where stock torchvision raises that.
    """
    if targets is None:
        raise TargetValueError("targets are needed to compute losses, got None")
    if isinstance(targets, Mapping | str | bytes) or not hasattr(targets, "__len__"):
        raise TypeError(f"targets: expected a list of dicts, one per image, got {type(targets).__name__}")
    if len(images) != len(targets):
        raise ValueError(f"got {len(images)} images but {len(targets)} targets")
    findings: list[_Finding] = []
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        if not isinstance(target, Mapping):
            raise TypeError(f"image {index} of the batch: a target is a dict, got {type(target).__name__}")
        name = image_name(index, target)
        _check_image_form(name, image, expected)
        _check_form(name, image, target, expected)
        findings += _pixel_findings(name, index, image, expected)
        if len(target["boxes"]):
            findings += _object_findings(name, index, image, target, expected)
        findings += _optional_findings(name, index, target, expected)
    if not findings:
        return None
    # Masks may be on the host where boxes are on a GPU.
    device = findings[-1].found.device
    verdicts = torch.stack([finding.found.any().to(device) for finding in findings]).tolist()
    confirmed = [finding for finding, verdict in zip(findings, verdicts, strict=True) if verdict]
    for finding in confirmed:
        if finding.fatal:
            _raise(finding, images[finding.index], targets[finding.index])
    if check_box_format and expected.has_masks:
        for index, (image, target) in enumerate(zip(images, targets, strict=True)):
            if len(target["boxes"]) and (meant := box_format_hint(image, target)):
                raise ValueError(f"{image_name(index, target)}, boxes: {meant}")
    return f"{confirmed[0].message}; they train as they are, as in torchvision" if confirmed else None


def in_plain_form(targets: Sequence[Target], images: Sequence[Tensor]) -> list[Target]:
    """Return targets in the form that torchvision's code needs; what has it is left as it is.

    Users write the fields of an image without objects in many shapes, such as `torch.tensor([])`, and leave out the
    masks where `has_mask` says that there are none.
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
            if isinstance(target.get("masks"), Tensor):
                changes["masks"] = target["masks"].new_zeros((0, height, width), dtype=torch.uint8)
            if isinstance(target.get("keypoints"), Tensor):
                points = target["keypoints"]
                count = points.shape[1] if points.dim() == 3 else 0
                changes["keypoints"] = points.new_zeros((0, count, 3), dtype=torch.float32)
            if "has_mask" in target:
                changes["has_mask"] = boxes.new_zeros(0, dtype=torch.bool)
        if "has_mask" in target and "masks" not in target:
            changes["masks"] = EncodedMasks([None] * len(boxes), height, width)
        if "ignore_boxes" in target and target["ignore_boxes"].numel() == 0:
            changes["ignore_boxes"] = target["ignore_boxes"].new_zeros((0, 4), dtype=torch.float32)
        plain.append({**target, **changes} if changes else target)
    return plain


def image_name(index: int, target: Target) -> str:
    """Return how errors name an image: its place in the batch, and its id if it has one."""
    image_id = target.get("image_id")
    if isinstance(image_id, Tensor) and image_id.numel() == 1:
        image_id = int(image_id)
    known = isinstance(image_id, int) or (isinstance(image_id, str) and len(image_id) <= 80)
    return f"image {index} of the batch" + (f" (image_id {image_id})" if known else "")


def _check_image_form(name: str, image: Any, expected: ModelInputs) -> None:
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
        raise ValueError(f"{name}: expected ({channels}, H, W), got shape {shape}{cause}")
    if (
        expected.min_size is not None
        and expected.max_size is not None
        and is_resized_to_nothing(shape[1], shape[2], expected.min_size, expected.max_size)
    ):
        raise ValueError(
            f"{name}: its {shape[1]} x {shape[2]} px (H x W) are resized to at most {expected.max_size} px, "
            "which leaves nothing of its shorter side; cut it into parts or raise max_size"
        )


def is_resized_to_nothing(height: int, width: int, min_size: int, max_size: int) -> bool:
    """Say whether torchvision's resizing leaves no pixel of an image's shorter side.

    Args:
        height: of the image, in px.
        width: of the image, in px.
        min_size: px that the shorter side is to get.
        max_size: px that the longer side may get.
    """
    shorter, longer = sorted((height, width))
    return int(shorter * min(min_size / shorter, max_size / longer)) < 1


def _check_form(name: str, image: Tensor, target: Target, expected: ModelInputs) -> None:
    """Check keys, types, dtypes, shapes and counts, which needs no values."""
    masks_needed = expected.has_masks and "has_mask" not in target
    needed = ["boxes", "labels"] + ["masks"] * masks_needed + ["keypoints"] * expected.has_keypoints
    for field in needed:
        if field not in target:
            raise ValueError(f"{name}: the target has no {field}")
    boxes, labels = target["boxes"], target["labels"]
    if not isinstance(boxes, Tensor):
        raise TargetTypeError(f"{name}, boxes: expected a tensor, got {type(boxes).__name__}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}, labels: expected a tensor, got {type(labels).__name__}")
    if boxes.is_complex() or boxes.dtype == torch.bool:
        raise TypeError(f"{name}, boxes: expected a floating-point or integer dtype, got {boxes.dtype}")
    if isinstance(boxes, BoundingBoxes) and boxes.format != BoundingBoxFormat.XYXY:
        raise ValueError(
            f"{name}, boxes: are BoundingBoxes in {boxes.format.value}, the model needs XYXY; "
            'torchvision.transforms.v2.ConvertBoundingBoxFormat("XYXY") converts them'
        )
    if "ignore_boxes" in target:
        _check_ignore_boxes_form(name, target["ignore_boxes"])
    if boxes.numel() == 0 and boxes.shape[:1] in ((), (0,)):
        # Without objects there is nothing to read, and users write the empty fields in many shapes.
        return
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise TargetValueError(f"{name}, boxes: expected shape (G, 4), got {tuple(boxes.shape)}")
    count = len(boxes)
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}, labels: expected torch.int64, got {labels.dtype}")
    if labels.shape != (count,):
        raise ValueError(
            f"{name}, labels: expected shape ({count},) for as many boxes, got {tuple(labels.shape)}"
        )
    if expected.has_masks and "masks" in target:
        _check_masks_form(name, image, target["masks"], count)
    if "has_mask" in target:
        has_mask = target["has_mask"]
        if not isinstance(has_mask, Tensor) or has_mask.dtype != torch.bool or has_mask.shape != (count,):
            found = type(has_mask).__name__
            if isinstance(has_mask, Tensor):
                found = f"{has_mask.dtype} {tuple(has_mask.shape)}"
            raise TypeError(
                f"{name}, has_mask: expected a bool tensor ({count},) for as many boxes, got {found}"
            )
    if expected.has_keypoints:
        keypoints = target["keypoints"]
        if not isinstance(keypoints, Tensor) or not keypoints.is_floating_point():
            raise TypeError(f"{name}, keypoints: expected a floating-point tensor")
        if keypoints.dim() != 3 or len(keypoints) != count or keypoints.shape[2] != 3:
            raise ValueError(
                f"{name}, keypoints: expected shape ({count}, number of keypoints, 3), got {tuple(keypoints.shape)}"
            )


def _check_ignore_boxes_form(name: str, boxes: Any) -> None:
    if not isinstance(boxes, Tensor) or boxes.is_complex() or boxes.dtype == torch.bool:
        raise TypeError(f"{name}, ignore_boxes: expected a tensor (I, 4), got {type(boxes).__name__}")
    if isinstance(boxes, BoundingBoxes) and boxes.format != BoundingBoxFormat.XYXY:
        raise ValueError(
            f"{name}, ignore_boxes: are BoundingBoxes in {boxes.format.value}, the model needs XYXY"
        )
    if boxes.numel() and (boxes.dim() != 2 or boxes.shape[1] != 4):
        raise ValueError(f"{name}, ignore_boxes: expected shape (I, 4), got {tuple(boxes.shape)}")


def _check_masks_form(name: str, image: Tensor, masks: Any, count: int) -> None:
    if not isinstance(masks, Tensor | EncodedMasks):
        raise TypeError(f"{name}, masks: expected a tensor or EncodedMasks, got {type(masks).__name__}")
    if isinstance(masks, Tensor) and masks.is_complex():
        raise TypeError(f"{name}, masks: expected a tensor of 0 and 1, got {masks.dtype}")
    expected = (count, *image.shape[-2:])
    if tuple(masks.shape) != expected:
        raise ValueError(
            f"{name}, masks: expected shape {expected}, one mask of the image's size per box, "
            f"got {tuple(masks.shape)}"
        )


def _pixel_findings(name: str, index: int, image: Tensor, expected: ModelInputs) -> list[_Finding]:
    if not expected.unit_range:
        return []
    low, high = image.detach().aminmax()
    # Also of NaN, which is in no range.
    outside = ~((low >= _PIXEL_RANGE[0]) & (high <= _PIXEL_RANGE[1]))
    message = (
        f"{name}: its pixels are not in about [0, 1], which the model normalizes; "
        "divide images in 0..255 by 255, and do not normalize them before"
    )
    return [_Finding(outside, message, index)]


def _object_findings(
    name: str, index: int, image: Tensor, target: Target, expected: ModelInputs
) -> list[_Finding]:
    boxes, labels = target["boxes"].detach().as_subclass(Tensor), target["labels"]
    height, width = image.shape[-2:]
    precision = torch.finfo(boxes.dtype).eps if boxes.is_floating_point() else 0.0
    exact = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    size = exact.new_tensor([width, height, width, height])
    slack = _BORDER_TOLERANCE + precision * size
    found = [
        _Finding(~exact.isfinite().all(1), f"{name}, boxes: a box is not finite", index),
        _Finding(
            (exact[:, 2:] <= exact[:, :2]).any(1),
            f"{name}, boxes: a box has no area, x2 > x1 and y2 > y1 are needed",
            index,
            error=TargetValueError,
        ),
        _Finding(labels < 1, f"{name}, labels: a label is below 1, and 0 is background", index),
    ]
    if expected.num_classes is not None:
        message = f"{name}, labels: a label is not below num_classes, {expected.num_classes}"
        found.append(_Finding(labels >= expected.num_classes, message, index))
    masks = target.get("masks")
    if expected.has_masks and isinstance(masks, Tensor) and masks.dtype != torch.bool:
        masks = masks.as_subclass(Tensor)
        if masks.dtype == torch.uint8:
            other = masks.flatten(1).amax(1) > 1
        else:
            other = ((masks != 0) & (masks != 1)).flatten(1).any(1)
        if "has_mask" in target:
            other = other & target["has_mask"].to(other.device)
        message = f"{name}, masks: a mask has values other than 0 and 1, use `masks > 0`"
        found.append(_Finding(other, message, index))
    outside = ((exact < -slack) | (exact > size + slack)).any(1)
    message = f"{name}, boxes: boxes reach outside of the image of {height} x {width} (H x W)"
    found.append(_Finding(outside, message, index, fatal=False))
    return found


def _optional_findings(name: str, index: int, target: Target, expected: ModelInputs) -> list[_Finding]:
    """Check the values of keys that a target need not have."""
    found = []
    if expected.has_masks and "has_mask" in target and "masks" not in target and len(target["boxes"]):
        message = f"{name}: the target has no masks, but has_mask says that an object has one"
        found.append(_Finding(target["has_mask"], message, index))
    ignored = target.get("ignore_boxes")
    if ignored is not None and ignored.numel():
        wrong = ~ignored.isfinite().all(1) | (ignored[:, 2:] <= ignored[:, :2]).any(1)
        message = f"{name}, ignore_boxes: a box is not finite or has no area, x2 > x1 and y2 > y1 are needed"
        found.append(_Finding(wrong.any(), message, index))
    return found


def _raise(finding: _Finding, image: Tensor, target: Target) -> NoReturn:
    message = finding.message
    if finding.found.dim():
        instance = int(finding.found.long().argmax())
        box, label = target["boxes"][instance].tolist(), int(target["labels"][instance])
        message = f"{message} (instance {instance}: box {box}, label {label})"
        if "boxes: a box has no area" in message and (meant := box_format_hint(image, target)):
            message = f"{message}; {meant}"
    raise finding.error(message)


def box_format_hint(image: Tensor, target: Target) -> str | None:
    """Say in which other format an image's boxes are, where that fits all of its masks and xyxy in px fits none.

    Boxes that are loose or show more than what is visible fit neither way, so they pass.

    Args:
        image: (3, H, W).
        target: boxes (G, 4) and masks, as a tensor (G, H, W) or encoded.

    Returns:
        What the boxes are and how to convert them; None where they are xyxy, or it cannot be told.
    """
    masks = target.get("masks")
    if not isinstance(masks, Tensor | EncodedMasks) or len(masks) != len(target["boxes"]):
        return None
    extents = mask_extents(masks)
    boxes = target["boxes"].detach().as_subclass(Tensor).cpu().double()
    known = extents.isfinite().all(dim=1) & boxes.isfinite().all(dim=1)
    if "has_mask" in target:
        known &= target["has_mask"].cpu()
    boxes, extents = boxes[known], extents[known]
    if len(boxes) == 0 or _fits(boxes, extents).any():
        return None
    height, width = image.shape[-2:]
    size = boxes.new_tensor([width, height, width, height])
    in_fractions = bool(((boxes >= 0) & (boxes <= 1)).all())
    for file_format, words in (
        ("xyxy", "corners"),
        ("xywh", "x, y, width, height"),
        ("cxcywh", "center x, center y, width, height"),
    ):
        read = box_convert(boxes * size if in_fractions else boxes, file_format, "xyxy")
        if _fits(read, extents).all():
            scale = (
                f" after multiplying by the image's {width}, {height}, {width}, {height}"
                if in_fractions
                else ""
            )
            convert = (
                f'; torchvision.ops.box_convert(boxes, "{file_format}", "xyxy"){scale} gives what is needed'
            )
            if file_format == "xyxy":
                convert = f"; multiply them by {width}, {height}, {width}, {height}"
            unit = "fractions of the image" if in_fractions else "px"
            return f"the masks show that they are {words} in {unit}, not x1, y1, x2, y2 in px{convert}"
    return None


def mask_extents(masks: Tensor | EncodedMasks) -> Tensor:
    """Return the tight boxes of masks, (G, 4) float64 xyxy in px on the host, NaN for a mask without a pixel."""
    if isinstance(masks, EncodedMasks):
        return masks.extents()
    set_pixels = masks.detach().as_subclass(Tensor) != 0
    sides = []
    for occupied in (set_pixels.any(1).cpu(), set_pixels.any(2).cpu()):  # (G, W), (G, H)
        first = occupied.to(torch.uint8).argmax(1)
        end = occupied.shape[1] - occupied.flip(1).to(torch.uint8).argmax(1)
        sides.append(torch.stack([first, end], dim=1).double())
    boxes = torch.stack(sides, dim=2).flatten(1)  # (G, 4)
    return boxes.masked_fill(~occupied.any(1)[:, None], torch.nan)


def _fits(boxes: Tensor, extents: Tensor) -> Tensor:
    """Whether the sides of each box are about those of its mask, (G,)."""
    sides = extents[:, 2:] - extents[:, :2]
    tolerance = (_FIT_SHARE * sides).clamp(min=_FIT_PIXELS).repeat(1, 2)
    return ((boxes - extents).abs() <= tolerance).all(dim=1)
