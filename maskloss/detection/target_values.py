"""Checks of the values of images and targets, which are read from the device in one transfer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskloss.detection.box_format import box_format_hint
from maskloss.detection.model_inputs import ModelInputs
from maskloss.detection.target_errors import ImageName, Target, TargetValueError
from maskloss.masks.encoded import EncodedMasks
from maskloss.masks.transfer import to_host

#: Distance in px by which a box may exceed the image without a warning: annotations are rounded to two decimals.
_BORDER_TOLERANCE = 0.1
#: Accepted range of pixels that should be in [0, 1]: wide enough for noise and color jitter, but exceeded by images in
#: 0..255 and by images that have already been normalized.
_PIXEL_RANGE = (-1.0, 2.0)
_PIXEL_MESSAGE = (
    ": the pixels are not approximately in [0, 1]; divide images in 0..255 by 255, and do not normalize images, "
    "because the model normalizes them; for images in another range, set model.transform.image_mean and image_std, to "
    "[0.0] * 3 and [1.0] * 3 for images that are normalized already"
)
_NO_AREA_MESSAGE = ", boxes: a box has no area; x2 > x1 and y2 > y1 are required"
_BACKGROUND_MESSAGE = ", labels: a label is below 1; 0 is background"
#: Many recipes give images without objects a box with label 0, which would train the network to find it.
_NO_OBJECTS = (
    "; an image without objects has empty fields: boxes torch.zeros(0, 4), labels torch.zeros(0, dtype=torch.int64), "
    "masks torch.zeros(0, H, W, dtype=torch.uint8)"
)


@dataclass(frozen=True)
class Finding:
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
    image: ImageName
    fatal: bool = True
    error: type[Exception] = ValueError

    def to_error(self, image: Tensor, target: Target) -> Exception:
        """Return the error of a fatal finding, which names the first object that has the fault."""
        message = f"{self.image}{self.message}"
        if self.message is _PIXEL_MESSAGE:
            low, high = (float(value) for value in image.detach().as_subclass(Tensor).aminmax())
            message = f"{message} (they are from {low:g} to {high:g})"
        if self.message is _BACKGROUND_MESSAGE and not target["labels"].any():
            return self.error(message + _NO_OBJECTS)
        if self.found.dim():
            instance = int(self.found.long().argmax())
            box, label = target["boxes"][instance].tolist(), int(target["labels"][instance])
            message = f"{message} (instance {instance}: box {box}, label {label})"
            if self.message is _NO_AREA_MESSAGE:
                if not target["labels"].any():
                    message += _NO_OBJECTS
                elif meant := box_format_hint(image, target):
                    message = f"{message}; {meant}"
        return self.error(message)


#: Fields of a target that are checked value by value; masks are large, so their extremes are computed on their device.
_SMALL_FIELDS = ("boxes", "labels", "has_mask", "weights", "points", "ignore_boxes")


def read_values(images: Sequence[Tensor], targets: Sequence[Target], expected: ModelInputs) -> list[Target]:
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


def find_wrong_values(
    names: Sequence[ImageName], images: Sequence[Tensor], read: Sequence[Target], expected: ModelInputs
) -> list[Finding]:
    """Return what is wrong with the values of a batch, image by image; warnings, too.

    Args:
        names: names of the N images.
        images: N tensors (3, H, W), for their sizes.
        read: the values, from `read_values`.
        expected: properties of the model.
    """
    findings: list[Finding] = []
    for name, image, values in zip(names, images, read, strict=True):
        findings += _pixel_findings(name, values, expected)
        if len(values["boxes"]):
            findings += _object_findings(name, image, values, expected)
        findings += _optional_findings(name, image, values, expected)
    return [finding for finding in findings if finding.found.any()]


def _pixel_findings(name: ImageName, values: Target, expected: ModelInputs) -> list[Finding]:
    if not expected.unit_range:
        return []
    # Negated, so that NaN counts as outside.
    outside = ~((values["low"] >= _PIXEL_RANGE[0]) & (values["high"] <= _PIXEL_RANGE[1]))
    return [Finding(outside, _PIXEL_MESSAGE, name)]


def _object_findings(name: ImageName, image: Tensor, values: Target, expected: ModelInputs) -> list[Finding]:
    boxes, labels = values["boxes"], values["labels"]
    height, width = image.shape[-2:]
    precision = torch.finfo(boxes.dtype).eps if boxes.is_floating_point() else 0.0
    exact = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    size = exact.new_tensor([width, height, width, height])
    slack = _BORDER_TOLERANCE + precision * size
    found = [
        Finding(~exact.isfinite().all(1), ", boxes: a box is not finite", name),
        Finding(
            (exact[:, 2:] <= exact[:, :2]).any(1),
            _NO_AREA_MESSAGE,
            name,
            error=TargetValueError,
        ),
        Finding(labels < 1, _BACKGROUND_MESSAGE, name),
    ]
    if expected.num_classes is not None:
        message = f", labels: a label is not less than num_classes = {expected.num_classes}"
        found.append(Finding(labels >= expected.num_classes, message, name))
    if "not_binary" in values:
        other = values["not_binary"]
        if "has_mask" in values:
            other = other & values["has_mask"]
        message = ", masks: a mask has values other than 0 and 1; use `masks > 0`"
        found.append(Finding(other, message, name))
    outside = ((exact < -slack) | (exact > size + slack)).any(1)
    message = f", boxes: boxes reach outside the image of {height} x {width} px (H x W)"
    found.append(Finding(outside, message, name, fatal=False))
    return found


def _optional_findings(
    name: ImageName, image: Tensor, values: Target, expected: ModelInputs
) -> list[Finding]:
    """Check the values of optional keys."""
    found = []
    masks = values.get("masks")
    if expected.has_masks and "has_mask" in values and masks is None and len(values["boxes"]):
        message = ": the target has no masks, but has_mask says that an object has one"
        found.append(Finding(values["has_mask"], message, name))
    if expected.has_masks and "has_mask" in values and isinstance(masks, EncodedMasks) and len(masks):
        is_none = torch.tensor([not masks.has_mask(index) for index in range(len(masks))], device="cpu")
        message = ", has_mask: is True for an object whose mask is None"
        found.append(Finding(values["has_mask"] & is_none, message, name))
    if "weights" in values and len(values["boxes"]):
        weights = values["weights"]
        message = ", weights: a weight is negative or not finite"
        found.append(Finding(~(weights.isfinite() & (weights >= 0)), message, name))
    if "keypoints" in values and len(values["boxes"]):
        keypoints = values["keypoints"]
        # Where a keypoint is not visible, its place does not matter.
        wrong = ~keypoints.isfinite().all(2) & ~(keypoints[..., 2] <= 0)  # (G, K)
        message = ", keypoints: a visible keypoint, or whether it is visible, is not finite"
        found.append(Finding(wrong.any(dim=1), message, name))
    if "points" in values and len(values["boxes"]) and values["points"].numel():
        x, y, label = values["points"].unbind(dim=2)  # (G, K) each
        other = (label != 0) & (label != 1) & (label != -1)
        message = ", points: a label is not 1 inside the object, 0 outside or -1 for no point"
        found.append(Finding(other.any(dim=1), message, name))
        height, width = image.shape[-2:]
        inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)  # False also for NaN
        message = f", points: a labeled point is outside the image of {height} x {width} (H x W)"
        found.append(Finding(((label >= 0) & ~inside).any(dim=1), message, name))
    ignored = values.get("ignore_boxes")
    if ignored is not None and ignored.numel():
        wrong = ~ignored.isfinite().all(1) | (ignored[:, 2:] <= ignored[:, :2]).any(1)
        message = ", ignore_boxes: a box is not finite or has no area; x2 > x1 and y2 > y1 are required"
        found.append(Finding(wrong.any(), message, name))
    return found
