"""Validate the images and targets of a training batch before the model computes anything.

Inputs on which stock torchvision trains correctly pass. Inputs on which it silently trains wrongly, or fails inside a
kernel, raise an error that names the image and the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from maskloss.detection.box_format import box_format_hint
from maskloss.detection.model_inputs import ModelInputs
from maskloss.detection.target_errors import ImageName, Target, TargetValueError
from maskloss.detection.target_forms import check_image_form, check_target_form
from maskloss.detection.target_values import find_wrong_values, read_values


class CheckedInputs(NamedTuple):
    """The result of `check_inputs`.

    Attributes:
        warning: about boxes that reach outside their image; None if none do.
        boxes: per image, the target's boxes on the host.

    Example:
        >>> import torch
        >>> target = {"boxes": torch.tensor([[1.0, 1.0, 9.0, 5.0]]), "labels": torch.tensor([1])}
        >>> check_inputs([torch.rand(3, 8, 8)], [target], ModelInputs(num_classes=3)).warning[:41]
        'image 0 of the batch, boxes: boxes reach '
    """

    warning: str | None
    boxes: list[Tensor]


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
        >>> import torch
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
        names.append(ImageName(index, target))
        check_image_form(names[-1], image, expected)
        check_target_form(names[-1], image, target, expected)
    read = read_values(images, targets, expected)
    findings = find_wrong_values(names, images, read, expected)
    for finding in findings:
        if finding.fatal:
            raise finding.to_error(images[finding.image.index], targets[finding.image.index])
    if check_box_format and expected.has_masks:
        for name, image, target in zip(names, images, targets, strict=True):
            if len(target["boxes"]) and (meant := box_format_hint(image, target)):
                raise ValueError(f"{name}, boxes: {meant}")
    warning = None
    if findings:
        first = findings[0]
        warning = f"{first.image}{first.message}; training uses them unchanged, as torchvision does"
    return CheckedInputs(warning, [values["boxes"] for values in read])
