"""Validate the images and targets of a training batch before the model computes anything.

Inputs on which stock torchvision trains correctly pass. Inputs on which it silently trains wrongly, or fails inside a
kernel, raise an error that names the image and the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from maskloss.detection.transform import resized_size
from maskloss.masks.encoded import EncodedMasks
from maskloss.masks.transfer import to_host

Target = dict[str, Any]

#: Distance in px by which a box may exceed the image without a warning: annotations are rounded to two decimals.
_BORDER_TOLERANCE = 0.1
#: Accepted range of pixels that should be in [0, 1]: wide enough for noise and color jitter, but exceeded by images in
#: 0..255 and by images that have already been normalized.
_PIXEL_RANGE = (-1.0, 2.0)
_PIXEL_MESSAGE = (
    ": the pixels are not approximately in [0, 1]; divide images in 0..255 by 255, and do not normalize images, "
    "because the model normalizes them; for images in another range, set model.transform.image_mean and image_std"
)
#: Maximum distance between the sides of a box and of its mask, in px and relative to the mask's side.
_FIT_PIXELS, _FIT_SHARE = 2.0, 0.05


class TargetValueError(ValueError, AssertionError):
    """Wrong value of an input for which stock torchvision raises AssertionError; a subclass of that, too.

    Example:
        >>> issubclass(TargetValueError, ValueError), issubclass(TargetValueError, AssertionError)
        (True, True)
    """


class TargetTypeError(TypeError, AssertionError):
    """Wrong type of an input for which stock torchvision raises AssertionError; a subclass of that, too.

    Example:
        >>> issubclass(TargetTypeError, TypeError), issubclass(TargetTypeError, AssertionError)
        (True, True)
    """


@dataclass(frozen=True)
class ModelInputs:
    """Properties of a model that determine which images and targets it accepts.

    Attributes:
        num_classes: C, background included; None if unknown.
        has_masks: whether targets need masks.
        has_keypoints: whether targets need keypoints.
        num_keypoints: K, number of keypoints per object; None if unknown.
        num_channels: number of image channels; None if unknown, or if one mean serves all channels.
        unit_range: whether the model normalizes pixels in [0, 1].
        min_size: shorter side in px to which images are resized, the smallest of several; None if unknown.
        max_size: maximum longer side in px to which images are resized; None if unknown.

    Example:
        >>> ModelInputs(num_classes=3, has_masks=True).unit_range
        False
    """

    num_classes: int | None = None
    has_masks: bool = False
    has_keypoints: bool = False
    num_keypoints: int | None = None
    num_channels: int | None = None
    unit_range: bool = False
    min_size: int | None = None
    max_size: int | None = None


class CheckedInputs(NamedTuple):
    """The result of `check_inputs`.

    Attributes:
        warning: about boxes that reach outside their image; None if none do.
        boxes: per image, the target's boxes on the host.

    Example:
        >>> target = {"boxes": torch.tensor([[1.0, 1.0, 9.0, 5.0]]), "labels": torch.tensor([1])}
        >>> check_inputs([torch.rand(3, 8, 8)], [target], ModelInputs(num_classes=3)).warning[:41]
        'image 0 of the batch, boxes: boxes reach '
    """

    warning: str | None
    boxes: list[Tensor]


@dataclass(frozen=True)
class _ImageName:
    """The name of an image in messages. Its text is made on demand, because an image_id on a GPU has to be copied."""

    index: int
    target: Target

    def __str__(self) -> str:
        return image_name(self.index, self.target)


@dataclass(frozen=True)
class _Finding:
    """The result of one check of values.

    Attributes:
        found: whether the check failed: (G,) bool per object of an image, or a scalar for the image.
        message: text of the error or warning, after the image's name.
        image: the image.
        fatal: True for an error, False for a warning.
        error: type of the error.
    """

    found: Tensor
    message: str
    image: _ImageName
    fatal: bool = True
    error: type[Exception] = ValueError


def check_inputs(
    images: Sequence[Tensor],
    targets: Sequence[Target] | None,
    expected: ModelInputs,
    *,
    check_box_format: bool = False,
) -> CheckedInputs:
    """Raise an error if the images or targets of a training batch are invalid.

    The host synchronizes at most once per batch: it reads the targets' small fields, and the extremes of images and
    masks, which are computed on their own devices.

    Args:
        images: N float tensors (3, H, W), as passed to the model.
        targets: one dict per image: boxes (G, 4), xyxy in px of the image; labels (G,) int64 in [1, C); masks and
            keypoints if the model has these branches; optionally has_mask (G,), weights (G,), points (G, K, 3) and
            ignore_boxes (I, 4). Without objects, the fields may be empty tensors of any shape.
        expected: properties of the model.
        check_box_format: whether to compare boxes with masks, to detect boxes in another format than xyxy in px.
            This costs far more than the other checks, and more synchronizations.

    Returns:
        A warning or None, and copies of the boxes on the host.

    Raises:
        TypeError: an image or a field is not a tensor, or has the wrong dtype.
        ValueError: a field is missing or has the wrong shape; counts differ; boxes are degenerate, not finite or in
            another format; labels are out of range; masks do not have the image's size, or hold values other than 0
            and 1; a visible keypoint is not finite; or pixels are not approximately in [0, 1].
            Both errors are also AssertionErrors where stock torchvision raises AssertionError.

    Example:
        >>> target = {"boxes": torch.tensor([[1.0, 1.0, 5.0, 5.0]]), "labels": torch.tensor([3])}
        >>> check_inputs([torch.rand(3, 8, 8)], [target], ModelInputs(num_classes=3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: image 0 of the batch, labels: a label is not less than num_classes = 3 (instance 0: ...
    """
    if targets is None:
        raise TargetValueError("targets are needed to compute losses, got None")
    if isinstance(targets, Mapping | str | bytes) or not hasattr(targets, "__len__"):
        raise TypeError(f"targets: expected a list of dicts, one per image, got {type(targets).__name__}")
    if isinstance(images, Tensor) and images.dim() == 3:
        raise ValueError(
            f"images: expected a list of tensors (3, H, W), got one tensor {tuple(images.shape)}; pass [image]"
        )
    if len(images) == 0:
        raise ValueError("images is empty: training needs at least one image")
    if len(images) != len(targets):
        raise ValueError(f"got {len(images)} images but {len(targets)} targets")
    names = []
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        if not isinstance(target, Mapping):
            raise TypeError(f"image {index} of the batch: a target is a dict, got {type(target).__name__}")
        names.append(_ImageName(index, target))
        _check_image_form(names[-1], image, expected)
        _check_form(names[-1], image, target, expected)
    findings: list[_Finding] = []
    read = _read(images, targets, expected)
    for name, image, values in zip(names, images, read, strict=True):
        findings += _pixel_findings(name, values, expected)
        if len(values["boxes"]):
            findings += _object_findings(name, image, values, expected)
        findings += _optional_findings(name, image, values, expected)
    confirmed = [finding for finding in findings if finding.found.any()]
    for finding in confirmed:
        if finding.fatal:
            _raise(finding, images[finding.image.index], targets[finding.image.index])
    if check_box_format and expected.has_masks:
        for name, image, target in zip(names, images, targets, strict=True):
            if len(target["boxes"]) and (meant := box_format_hint(image, target)):
                raise ValueError(f"{name}, boxes: {meant}")
    warning = None
    if confirmed:
        first = confirmed[0]
        warning = f"{first.image}{first.message}; training uses them unchanged, as torchvision does"
    return CheckedInputs(warning, [values["boxes"] for values in read])


#: Fields of a target that are checked value by value; masks are large, so their extremes are computed on their device.
_SMALL_FIELDS = ("boxes", "labels", "has_mask", "weights", "points", "ignore_boxes")


def _read(images: Sequence[Tensor], targets: Sequence[Target], expected: ModelInputs) -> list[Target]:
    """Read, in one transfer, the values that the checks need.

    Returns:
        Per image, on the host: the target's small fields; its masks if they are `EncodedMasks`; "low" and "high", the
        image's least and greatest value, if the model expects a range; and "not_binary" (G,), whether a mask has values
        other than 0 and 1, if the masks' dtype allows them.
    """
    fields = (*_SMALL_FIELDS, "keypoints") if expected.has_keypoints else _SMALL_FIELDS
    read: list[Target] = []
    for image, target in zip(images, targets, strict=True):
        # Without objects, fields may also be empty lists.
        values = {
            field: target[field].detach().as_subclass(Tensor)
            for field in fields
            if isinstance(target.get(field), Tensor)
        }
        if expected.unit_range:
            low, high = image.detach().as_subclass(Tensor).aminmax()
            values |= {"low": low, "high": high}
        masks = target.get("masks")
        if (
            expected.has_masks
            and isinstance(masks, Tensor)
            and masks.dtype != torch.bool
            and len(target["boxes"])
        ):
            values["not_binary"] = _are_not_binary(masks.detach().as_subclass(Tensor))
        read.append(values)
    on_host = iter(to_host([tensor for values in read for tensor in values.values()]))
    read = [{field: next(on_host) for field in values} for values in read]
    for values, target in zip(read, targets, strict=True):
        if "masks" in target:
            values["masks"] = target["masks"]
    return read


def _are_not_binary(masks: Tensor) -> Tensor:
    """Return whether each of the masks (G, H, W), of any dtype but bool, has values other than 0 and 1, (G,) bool."""
    if masks.dtype == torch.uint8:
        return masks.flatten(1).amax(1) > 1
    if masks.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        low, high = masks.flatten(1).aminmax(dim=1)
        return (low < 0) | (high > 1)
    if masks.device.type != "cpu" or not masks.is_floating_point():
        return ((masks != 0) & (masks != 1)).flatten(1).any(1)
    # On a CPU, memory takes the time. Only 0 and 1 are their own squares, also if these are rounded.
    found, buffer = [], torch.empty_like(masks[0])
    for mask in masks:
        low, high = torch.mul(mask, mask, out=buffer).sub_(mask).aminmax()
        found.append((low != 0) | (high != 0))
    return torch.stack(found)


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


def image_name(index: int, target: Target) -> str:
    """Return the name of an image in error messages: its index in the batch, and its image_id if it has one.

    Example:
        >>> image_name(1, {"image_id": 41})
        'image 1 of the batch (image_id 41)'
    """
    image_id = target.get("image_id")
    if isinstance(image_id, Tensor) and image_id.numel() == 1:
        image_id = int(image_id)
    known = isinstance(image_id, int) or (isinstance(image_id, str) and len(image_id) <= 80)
    return f"image {index} of the batch" + (f" (image_id {image_id})" if known else "")


def _check_image_form(name: _ImageName, image: Any, expected: ModelInputs) -> None:
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


def is_resized_to_nothing(height: int, width: int, min_size: int, max_size: int) -> bool:
    """Return whether torchvision's resizing would reduce an image's shorter side to 0 px.

    Args:
        height: height of the image, in px.
        width: width of the image, in px.
        min_size: shorter side after resizing, in px.
        max_size: maximum longer side after resizing, in px.

    Example:
        >>> is_resized_to_nothing(1, 2160, min_size=800, max_size=1333)
        True
    """
    return min(resized_size(height, width, min_size, max_size)) < 1


def _check_form(name: _ImageName, image: Tensor, target: Target, expected: ModelInputs) -> None:
    """Check keys, types, dtypes, shapes and counts, without reading values."""
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
            raise TargetValueError(f"{name}: the target has no {field}")
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


def _check_no_objects(name: _ImageName, target: Target, expected: ModelInputs) -> None:
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


def _check_ignore_boxes_form(name: _ImageName, boxes: Any) -> None:
    if not isinstance(boxes, Tensor) or boxes.is_complex() or boxes.dtype == torch.bool:
        raise TypeError(f"{name}, ignore_boxes: expected a tensor (I, 4), got {type(boxes).__name__}")
    if isinstance(boxes, BoundingBoxes) and boxes.format != BoundingBoxFormat.XYXY:
        raise ValueError(
            f"{name}, ignore_boxes: BoundingBoxes have the format {boxes.format.value}, but the model needs XYXY; "
            'torchvision.transforms.v2.ConvertBoundingBoxFormat("XYXY") converts them'
        )
    if boxes.numel() and (boxes.dim() != 2 or boxes.shape[1] != 4):
        raise ValueError(f"{name}, ignore_boxes: expected shape (I, 4), got {tuple(boxes.shape)}")


def _check_weights_form(name: _ImageName, weights: Any, count: int) -> None:
    if not isinstance(weights, Tensor) or weights.is_complex() or weights.dtype == torch.bool:
        found = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"{name}, weights: expected a float tensor ({count},), one per box, got {found}")
    if weights.shape != (count,):
        raise ValueError(
            f"{name}, weights: expected shape ({count},), one per box, got {tuple(weights.shape)}"
        )


def _check_points_form(name: _ImageName, points: Any, count: int) -> None:
    if not isinstance(points, Tensor) or points.is_complex() or points.dtype == torch.bool:
        found = points.dtype if isinstance(points, Tensor) else type(points).__name__
        raise TypeError(f"{name}, points: expected a float tensor ({count}, K, 3), got {found}")
    if points.dim() != 3 or len(points) != count or points.shape[2] != 3:
        raise ValueError(
            f"{name}, points: expected shape ({count}, K, 3), x, y and label of K points per box, got "
            f"{tuple(points.shape)}"
        )


def _check_masks_form(name: _ImageName, image: Tensor, masks: Any, count: int) -> None:
    if not isinstance(masks, Tensor | EncodedMasks):
        raise TypeError(f"{name}, masks: expected a tensor or EncodedMasks, got {type(masks).__name__}")
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
            f"got {tuple(masks.shape)}"
        )


def _pixel_findings(name: _ImageName, values: Target, expected: ModelInputs) -> list[_Finding]:
    if not expected.unit_range:
        return []
    # Negated, so that NaN counts as outside.
    outside = ~((values["low"] >= _PIXEL_RANGE[0]) & (values["high"] <= _PIXEL_RANGE[1]))
    return [_Finding(outside, _PIXEL_MESSAGE, name)]


def _object_findings(
    name: _ImageName, image: Tensor, values: Target, expected: ModelInputs
) -> list[_Finding]:
    boxes, labels = values["boxes"], values["labels"]
    height, width = image.shape[-2:]
    precision = torch.finfo(boxes.dtype).eps if boxes.is_floating_point() else 0.0
    exact = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    size = exact.new_tensor([width, height, width, height])
    slack = _BORDER_TOLERANCE + precision * size
    found = [
        _Finding(~exact.isfinite().all(1), ", boxes: a box is not finite", name),
        _Finding(
            (exact[:, 2:] <= exact[:, :2]).any(1),
            ", boxes: a box has no area; x2 > x1 and y2 > y1 are required",
            name,
            error=TargetValueError,
        ),
        _Finding(labels < 1, ", labels: a label is below 1; 0 is background", name),
    ]
    if expected.num_classes is not None:
        message = f", labels: a label is not less than num_classes = {expected.num_classes}"
        found.append(_Finding(labels >= expected.num_classes, message, name))
    if "not_binary" in values:
        other = values["not_binary"]
        if "has_mask" in values:
            other = other & values["has_mask"]
        message = ", masks: a mask has values other than 0 and 1; use `masks > 0`"
        found.append(_Finding(other, message, name))
    outside = ((exact < -slack) | (exact > size + slack)).any(1)
    message = f", boxes: boxes reach outside the image of {height} x {width} px (H x W)"
    found.append(_Finding(outside, message, name, fatal=False))
    return found


def _optional_findings(
    name: _ImageName, image: Tensor, values: Target, expected: ModelInputs
) -> list[_Finding]:
    """Check the values of optional keys."""
    found = []
    masks = values.get("masks")
    if expected.has_masks and "has_mask" in values and masks is None and len(values["boxes"]):
        message = ": the target has no masks, but has_mask says that an object has one"
        found.append(_Finding(values["has_mask"], message, name))
    if expected.has_masks and "has_mask" in values and isinstance(masks, EncodedMasks) and len(masks):
        is_none = torch.tensor([not masks.has_mask(index) for index in range(len(masks))], device="cpu")
        message = ", has_mask: is True for an object whose mask is None"
        found.append(_Finding(values["has_mask"] & is_none, message, name))
    if "weights" in values and len(values["boxes"]):
        weights = values["weights"]
        message = ", weights: a weight is negative or not finite"
        found.append(_Finding(~(weights.isfinite() & (weights >= 0)), message, name))
    if "keypoints" in values and len(values["boxes"]):
        keypoints = values["keypoints"]
        # Where a keypoint is not visible, its place does not matter.
        wrong = ~keypoints.isfinite().all(2) & ~(keypoints[..., 2] <= 0)  # (G, K)
        message = ", keypoints: a visible keypoint, or whether it is visible, is not finite"
        found.append(_Finding(wrong.any(dim=1), message, name))
    if "points" in values and len(values["boxes"]) and values["points"].numel():
        x, y, label = values["points"].unbind(dim=2)  # (G, K) each
        other = (label != 0) & (label != 1) & (label != -1)
        message = ", points: a label is not 1 inside the object, 0 outside or -1 for no point"
        found.append(_Finding(other.any(dim=1), message, name))
        height, width = image.shape[-2:]
        inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)  # False also for NaN
        message = f", points: a labeled point is outside the image of {height} x {width} (H x W)"
        found.append(_Finding(((label >= 0) & ~inside).any(dim=1), message, name))
    ignored = values.get("ignore_boxes")
    if ignored is not None and ignored.numel():
        wrong = ~ignored.isfinite().all(1) | (ignored[:, 2:] <= ignored[:, :2]).any(1)
        message = ", ignore_boxes: a box is not finite or has no area; x2 > x1 and y2 > y1 are required"
        found.append(_Finding(wrong.any(), message, name))
    return found


def _raise(finding: _Finding, image: Tensor, target: Target) -> NoReturn:
    message = f"{finding.image}{finding.message}"
    if finding.message is _PIXEL_MESSAGE:
        low, high = (float(value) for value in image.detach().as_subclass(Tensor).aminmax())
        message = f"{message} (they are from {low:g} to {high:g})"
    if finding.found.dim():
        instance = int(finding.found.long().argmax())
        box, label = target["boxes"][instance].tolist(), int(target["labels"][instance])
        message = f"{message} (instance {instance}: box {box}, label {label})"
        if "boxes: a box has no area" in message and (meant := box_format_hint(image, target)):
            message = f"{message}; {meant}"
    raise finding.error(message)


def box_format_hint(image: Tensor, target: Target) -> str | None:
    """Detect boxes in another format: one that fits all masks of the image, while xyxy in px fits no mask.

    Loose boxes, and boxes that include occluded parts, fit in no format, so they pass.

    Args:
        image: (3, H, W).
        target: boxes (G, 4) and masks, as a tensor (G, H, W) or `EncodedMasks`.

    Returns:
        The format of the boxes and how to convert them; None if they are xyxy, or if the format is unclear.

    Example:
        >>> image, masks = torch.rand(3, 40, 40), torch.zeros(1, 40, 40, dtype=torch.bool)
        >>> masks[:, 10:20, 10:30] = True
        >>> box_format_hint(image, {"boxes": torch.tensor([[10.0, 10.0, 20.0, 10.0]]), "masks": masks})[:59]
        'the masks show that the boxes are x, y, width, height in px'
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
            convert = f'; torchvision.ops.box_convert(boxes, "{file_format}", "xyxy"){scale} converts them'
            if file_format == "xyxy":
                convert = f"; multiply them by {width}, {height}, {width}, {height}"
            unit = "fractions of the image" if in_fractions else "px"
            return f"the masks show that the boxes are {words} in {unit}, not x1, y1, x2, y2 in px{convert}"
    return None


def mask_extents(masks: Tensor | EncodedMasks) -> Tensor:
    """Return the tight boxes of masks, (G, 4) float64 xyxy in px on the host; NaN for empty masks.

    Example:
        >>> mask_extents(torch.tensor([[[0, 1, 1], [0, 0, 0]]]))
        tensor([[1., 0., 3., 1.]], dtype=torch.float64)
    """
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
    """Return whether each box fits the tight box of its mask, up to a tolerance, (G,) bool."""
    sides = extents[:, 2:] - extents[:, :2]
    tolerance = (_FIT_SHARE * sides).clamp(min=_FIT_PIXELS).repeat(1, 2)
    return ((boxes - extents).abs() <= tolerance).all(dim=1)
