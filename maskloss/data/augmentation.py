"""Augmentation by torchvision.transforms.v2, with masks that stay polygons and RLEs.

v2's transforms look at tensors only and dispatch on their type, so `EncodedMasks` goes through them inside a
tensor subclass with kernels of its own. Where there is no exact kernel, a sample is augmented in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from maskloss.masks.encoded import EncodedMasks

Target = dict[str, Any]
Transforms = Callable[..., Any]


def augmentation(*, horizontal_flip: float, photometric_distortion: float) -> v2.Transform:
    """Augment as the reference recipes do; sizes are jittered by the model's own `min_size`.

    Args:
        horizontal_flip: probability in [0, 1].
        photometric_distortion: probability in [0, 1] of each change of brightness, contrast, saturation and hue.
    """
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(horizontal_flip),
            *([v2.RandomPhotometricDistort(p=photometric_distortion)] if photometric_distortion else []),
        ]
    )


#: Fields that are of the image, however many entries they have.
_OF_THE_IMAGE = ("image_id", "size", "orig_size", "original_size", "image_size", "ignore_boxes")


def augmented(transforms: Transforms, image: Tensor, target: Target, seed: int) -> tuple[Tensor, Target]:
    """Put one sample through transforms, in step with all that belongs to its objects.

    Flips to either side, resizing, jitter of the scale, crops (also in the center or by IoU), padding with nothing,
    zooming out and changes of color keep masks encoded and exact. For others, such as a rotation, masks become
    (G, H, W) uint8.

    Args:
        transforms: of torchvision.transforms.v2, called with the image and the target. A transform of one's own
            is to treat masks as v2's do, by the functions of `v2.functional`.
        image: (3, H, W) uint8.
        target: boxes (G, 4) xyxy in px, labels (G,), masks `EncodedMasks`, and whatever else: ignore_boxes (I, 4),
            keypoints and points (G, K, 3) are changed as boxes are; of other tensors, arrays and lists, those with one
            entry for each object follow when objects are dropped, their values as they are (`area` stays the
            annotation's).
        seed: of all that the transforms draw from torch's generator, which is left as it was.

    Returns:
        The image and a new target, without objects whose boxes were pushed out of the image. Keypoints that lie outside
        have x, y and visibility 0, points the label -1.
    """
    masks = target["masks"]
    try:
        pixels, changed = _transformed(transforms, image, {**target, "masks": _Encoded.of(masks)}, seed)
        carrier = changed["masks"]
        if not isinstance(carrier, _Encoded):
            raise _NeedsPixels
        changed["masks"] = carrier.masks
    except _NeedsPixels:
        dense = tv_tensors.Mask(masks.bitmaps())
        pixels, changed = _transformed(transforms, image, {**target, "masks": dense}, seed)
        changed["masks"] = changed["masks"].as_subclass(Tensor)
    count = len(target["boxes"])
    if len(changed["boxes"]) != count:
        # A transform that drops objects knows boxes, labels and tensors of masks alone. Which ones it drops shows in
        # their numbers in the place of the labels.
        numbered = {key: value for key, value in target.items() if key != "masks"}
        _, by_number = _transformed(transforms, image, {**numbered, "labels": torch.arange(count)}, seed)
        changed = _selected(changed, by_number["labels"], count)
    boxes = functional.clamp_bounding_boxes(changed["boxes"]).as_subclass(Tensor)
    changed["boxes"] = boxes
    kept = torch.where((boxes[:, 2:] > boxes[:, :2]).all(dim=1))[0]
    return pixels, changed if len(kept) == len(boxes) else _selected(changed, kept, len(boxes))


def _selected(target: Target, kept: Tensor, count: int) -> Target:
    """Return a target whose fields of `count` objects are those of the kept ones (int64)."""
    selected: Target = {}
    for key, value in target.items():
        per_object = key not in _OF_THE_IMAGE and not isinstance(value, str) and _length(value) == count
        if not per_object:
            selected[key] = value
        elif isinstance(value, list | tuple):
            selected[key] = type(value)([value[index] for index in kept.tolist()])
        else:
            selected[key] = value[kept.numpy() if isinstance(value, np.ndarray) else kept]
    return selected


def _length(value: Any) -> int | None:
    """How many entries a tensor, an array, encoded masks or a list have; None of what has none."""
    try:
        return len(value)
    except TypeError:
        return None


def _transformed(transforms: Transforms, image: Tensor, target: Target, seed: int) -> tuple[Tensor, Target]:
    """Call the transforms with the types that they dispatch on, and give plain tensors back."""
    size = (image.shape[-2], image.shape[-1])
    wrapped: Target = {
        **target,
        "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size),
        **{key: _Beside.of_boxes(target[key], size) for key in ("ignore_boxes",) if key in target},
        **{key: _Beside.of_points(target[key], size) for key in ("keypoints", "points") if key in target},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed_image, changed = transforms(tv_tensors.Image(image), wrapped)
    changed = dict(changed)
    if "ignore_boxes" in changed:
        ignored = functional.clamp_bounding_boxes(changed["ignore_boxes"].boxes).as_subclass(Tensor)
        changed["ignore_boxes"] = ignored[(ignored[:, 2:] > ignored[:, :2]).all(dim=1)]
    height, width = changed_image.shape[-2:]
    for key, outside in (("keypoints", (0.0, 0.0, 0.0)), ("points", (None, None, -1.0))):
        if key in changed:
            changed[key] = _points_inside(changed[key].boxes, target[key], (height, width), outside)
    return changed_image.as_subclass(Tensor), changed


def _points_inside(
    moved: Tensor, before: Tensor, size: tuple[int, int], outside: tuple[float | None, ...]
) -> Tensor:
    """Return points (G, K, 3) with the places that they were moved to, and what they get where that is outside."""
    points = before.clone()
    xy = moved.as_subclass(Tensor)[:, :2].reshape(*before.shape[:2], 2).to(points.dtype)
    points[..., :2] = xy
    # Some versions of torchvision clamp boxes on their way, so the border counts as outside.
    gone = (xy <= 0).any(dim=2) | (xy[..., 0] >= size[1]) | (xy[..., 1] >= size[0])
    for place, value in enumerate(outside):
        if value is not None:
            points[..., place] = points[..., place].masked_fill(gone, value)
    return points


class _NeedsPixels(Exception):
    """A transform has no exact counterpart for encoded masks."""


class _Encoded(tv_tensors.TVTensor):
    """`EncodedMasks` in the clothes of a tensor."""

    masks: EncodedMasks

    @classmethod
    def of(cls, masks: EncodedMasks) -> _Encoded:
        carrier = torch.empty(0).as_subclass(cls)
        carrier.masks = masks
        return carrier


class _Beside(tv_tensors.TVTensor):
    """Boxes or points that move with the image, and that no transform takes for the objects' boxes.

    v2 has transforms that look for the one tensor of boxes, such as a crop by IoU or the removal of degenerate boxes.
    """

    boxes: tv_tensors.BoundingBoxes

    @classmethod
    def of(cls, boxes: tv_tensors.BoundingBoxes) -> _Beside:
        carrier = torch.empty(0).as_subclass(cls)
        carrier.boxes = boxes
        return carrier

    @classmethod
    def of_boxes(cls, boxes: Tensor, size: tuple[int, int]) -> _Beside:
        return cls.of(tv_tensors.BoundingBoxes(boxes.reshape(-1, 4), format="XYXY", canvas_size=size))

    @classmethod
    def of_points(cls, points: Tensor, size: tuple[int, int]) -> _Beside:
        """Take points (G, K, 3) as boxes without an extent."""
        return cls.of_boxes(points[..., :2].reshape(-1, 2).repeat(1, 2).float(), size)


def _horizontal_flip(carrier: _Encoded) -> _Encoded:
    return _Encoded.of(carrier.masks.horizontal_flip())


def _vertical_flip(carrier: _Encoded) -> _Encoded:
    return _Encoded.of(carrier.masks.vertical_flip())


def _center_crop(carrier: _Encoded, output_size: Any) -> _Encoded:
    """Crop the center as torchvision does: what is smaller than the crop is padded first."""
    sizes = [output_size] if isinstance(output_size, int) else list(output_size)
    height, width = (sizes * 2)[:2]
    _, own_height, own_width = carrier.masks.shape
    missing = max(height - own_height, 0), max(width - own_width, 0)
    padding = [missing[1] // 2, missing[0] // 2, (missing[1] + 1) // 2, (missing[0] + 1) // 2]
    padded = _pad(carrier, padding) if any(padding) else carrier
    _, own_height, own_width = padded.masks.shape
    top, left = round((own_height - height) / 2.0), round((own_width - width) / 2.0)
    return _crop(padded, top, left, height, width)


def _resize(carrier: _Encoded, size: Any, max_size: Any = None, **_: Any) -> _Encoded:
    # torchvision's own rule for the new size, on a tensor without memory.
    blank = torch.empty(carrier.masks.shape[1:], device="meta")[None]
    height, width = functional.resize_mask(blank, size=size, max_size=max_size).shape[-2:]
    return _Encoded.of(carrier.masks.resize(height, width))


def _crop(carrier: _Encoded, top: int, left: int, height: int, width: int) -> _Encoded:
    try:
        return _Encoded.of(carrier.masks.crop(top, left, height, width))
    except ValueError:
        raise _NeedsPixels from None


def _resized_crop(
    carrier: _Encoded, top: int, left: int, height: int, width: int, size: Any, **_: Any
) -> _Encoded:
    return _resize(_crop(carrier, top, left, height, width), size)


def _pad(carrier: _Encoded, padding: Any, fill: Any = None, padding_mode: str = "constant") -> _Encoded:
    if padding_mode != "constant" or fill not in (None, 0):
        raise _NeedsPixels
    sides = [padding] if isinstance(padding, int) else list(padding)
    left, top, right, bottom = (sides * 4)[:4]  # of one, two (x and y) or four numbers
    _, height, width = carrier.masks.shape
    return _crop(carrier, -top, -left, top + height + bottom, left + width + right)


def _refuse(carrier: _Encoded, *_: Any, **__: Any) -> NoReturn:
    raise _NeedsPixels


def _as_boxes(function: Callable[..., Any], carrier: _Beside, *arguments: Any, **options: Any) -> _Beside:
    return _Beside.of(function(carrier.boxes, *arguments, **options))


def _register() -> None:
    exact = {
        "horizontal_flip": _horizontal_flip,
        "vertical_flip": _vertical_flip,
        "center_crop": _center_crop,
        "resize": _resize,
        "crop": _crop,
        "resized_crop": _resized_crop,
        "pad": _pad,
        "to_dtype": lambda carrier, *_, **__: carrier,
    }
    # v2 passes by a type that has no kernel; so whatever changes masks gets one, also what is yet to come.
    changing = [name.removesuffix("_mask") for name in dir(functional) if name.endswith("_mask")]
    for name in {*changing, *exact}:
        functional.register_kernel(getattr(functional, name), _Encoded)(exact.get(name, _refuse))
    suffix = "_bounding_boxes"
    for name in [name.removesuffix(suffix) for name in dir(functional) if name.endswith(suffix)]:
        function = getattr(functional, name, None)
        if name in ("clamp", "get_size") or function is None:
            continue
        functional.register_kernel(function, _Beside)(partial(_as_boxes, function))


_register()
