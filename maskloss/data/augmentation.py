"""Augmentation by torchvision.transforms.v2, in step with all that belongs to an object.

Masks stay polygons and RLEs where there is an exact way; for other transforms a sample is augmented in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from maskloss.data.tv_tensors import Bitmaps, Encoded, NeedsPixels, Points, Regions, Size, plain
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


#: Fields of the image, whatever their length.
_OF_THE_IMAGE = ("image_id", "size", "orig_size", "original_size", "image_size", "ignore_boxes")

#: What a point gets whose place is outside the image: a value for x, y and the third column, or None to keep it.
_OUTSIDE = {"keypoints": (0.0, 0.0, 0.0), "points": (None, None, -1.0)}


def augmented(transforms: Transforms, image: Tensor, target: Target, seed: int) -> tuple[Tensor, Target]:
    """Put one sample through transforms, in step with all that belongs to its objects.

    Flips to either side, resizing, jitter of the scale, crops (also in the center or by IoU), padding, zooming out and
    changes of color keep encoded masks encoded and exact. For others, such as a rotation, masks become (G, H, W)
    uint8, and objects without a mask are marked in `has_mask`. Masks are filled with 0 whatever the image is filled
    with.

    Args:
        transforms: of torchvision.transforms.v2, or any function of the image and the target. A function that selects
            objects indexes the masks with them.
        image: (3, H, W) uint8 or float.
        target: boxes (G, 4), xyxy in px or `BoundingBoxes` of any format that is not rotated, and any of these:

            - masks: `EncodedMasks`, or a tensor (G, H, W) of 0 and 1.
            - ignore_boxes (I, 4), xyxy in px.
            - keypoints (G, K, 2), or (G, K, 3) with a visibility, and points (G, K, 3) with a label: x and y in px,
              0 at the left and upper border. A flip does not exchange left and right keypoints.
            - `KeyPoints`, which change as v2 changes them.
            - other tensors, arrays and lists. Those with one entry per object follow when objects are dropped. Their
              values stay: `area` is the annotation's.
        seed: of all that the transforms draw from torch's generator, which is left as it was.

    Returns:
        The image and a new target of plain tensors, boxes xyxy, without objects whose boxes were pushed out of the
        image. Keypoints outside the image have x, y and visibility 0, points the label -1.

    Raises:
        TypeError: the image, masks or points are of another type.
        ValueError: shapes that do not belong together, rotated boxes, or transforms that drop objects from some
            entries only. The message names the entry.

    Example:
        >>> transforms = v2.Compose([v2.RandomRotation(10, fill=127), v2.SanitizeBoundingBoxes()])
        >>> image, target = augmented(transforms, image, target, seed=0)
    """
    given = _checked(image, target)
    masks, every = given["masks"], torch.arange(len(given["boxes"]))
    try:
        if not isinstance(masks, EncodedMasks):
            raise NeedsPixels
        pixels, changed = _transformed(transforms, image, {**given, "masks": Encoded.of(masks, every)}, seed)
    except NeedsPixels:
        given = _with_bitmaps(given)
        bitmaps = Bitmaps.of(given["masks"].to(torch.uint8), every)
        pixels, changed = _transformed(transforms, image, {**given, "masks": bitmaps}, seed)
    changed, rows = _in_step(changed, given)
    _mark_outside(changed, given, rows, _size(pixels))
    if target.get("masks") is None:
        # They stood in for the objects, as has_mask did.
        changed = {key: value for key, value in changed.items() if key in target or key not in given}
        if "masks" in target:
            changed["masks"] = None
    boxes = changed["boxes"] = clip_boxes_to_image(changed["boxes"], _size(pixels))
    kept = torch.where(_has_area(boxes))[0]
    if len(kept) < len(boxes):
        changed = {
            key: _rows(value, kept) if _is_per_object(key, value, len(boxes)) else value
            for key, value in changed.items()
        }
    return pixels, changed


def _has_area(boxes: Tensor) -> Tensor:
    """Whether boxes (B, 4) have an area, (B,) bool."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def _size(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]


def _checked(image: Tensor, target: Target) -> Target:
    """Return the target with boxes xyxy, masks of every object, and points in floats; or raise what is wrong."""
    if not isinstance(image, Tensor):
        raise TypeError(
            f"image is a {type(image).__name__}, not a tensor (3, H, W): v2.functional.pil_to_tensor makes one of PIL's"
        )
    if image.ndim != 3:
        raise ValueError(f"image has the shape {tuple(image.shape)}, not (3, H, W)")
    size = _size(image)
    if "boxes" not in target:
        raise ValueError(f"the target has no boxes, only {sorted(target)}")
    checked = {**target, "boxes": _xyxy(target["boxes"], size, "boxes")}
    count = len(checked["boxes"])
    masks = target.get("masks")
    if masks is None:
        masks = EncodedMasks.of_checked([None] * count, *size)
    elif not isinstance(masks, EncodedMasks | Tensor):
        raise TypeError(f"masks are a {type(masks).__name__}, not EncodedMasks or a tensor (G, H, W)")
    if tuple(masks.shape) != (count, *size):
        raise ValueError(
            f"masks have the shape {tuple(masks.shape)}, not {(count, *size)} as {count} boxes and the image have it"
        )
    checked["masks"] = masks
    if "ignore_boxes" in target:
        checked["ignore_boxes"] = _xyxy(target["ignore_boxes"], size, "ignore_boxes")
    for key in _own_points(target):
        checked[key] = _points(target[key], count, key)
    return checked


def _own_points(target: Target) -> list[str]:
    """Return the entries of points that move as the corners of boxes; those of v2's own type move as v2 has it."""
    return [key for key in _OUTSIDE if key in target and not isinstance(target[key], tv_tensors.KeyPoints)]


def _floats(tensor: Tensor) -> Tensor:
    """Return a tensor that resizing and rotating do not truncate."""
    return tensor if tensor.is_floating_point() else tensor.float()


def _xyxy(boxes: Tensor, size: Size, name: str) -> Tensor:
    """Return boxes of any format as plain xyxy in floats."""
    if not isinstance(boxes, Tensor):
        raise TypeError(f"{name} are a {type(boxes).__name__}, not a tensor (G, 4)")
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        if boxes.shape[-1] != 4:
            raise ValueError(f"{name} are rotated ({boxes.format.value}), not boxes of four numbers")
        given = tv_tensors.wrap(_floats(plain(boxes)), like=boxes)
        boxes = functional.convert_bounding_box_format(given, new_format=tv_tensors.BoundingBoxFormat.XYXY)
    boxes = _floats(plain(boxes))
    if not boxes.numel():
        return boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name} have the shape {tuple(boxes.shape)}, not (G, 4)")
    return boxes


def _points(points: Tensor, count: int, name: str) -> Tensor:
    if not isinstance(points, Tensor):
        raise TypeError(f"{name} are a {type(points).__name__}, not a tensor ({count}, K, 3)")
    if points.numel() and (points.ndim != 3 or len(points) != count or points.shape[2] not in (2, 3)):
        raise ValueError(
            f"{name} have the shape {tuple(points.shape)}, not ({count}, K, 3) or ({count}, K, 2)"
        )
    return _floats(plain(points))


def _with_bitmaps(target: Target) -> Target:
    """Return the target with masks (G, H, W), and has_mask where an object has none, which bitmaps cannot say."""
    masks = target["masks"]
    if isinstance(masks, Tensor):
        return target
    has_mask = torch.tensor([masks.has_mask(index) for index in range(len(masks))], dtype=torch.bool)
    changed = {**target, "masks": masks.bitmaps()}
    if not has_mask.all():
        changed["has_mask"] = has_mask & torch.as_tensor(target.get("has_mask", has_mask))
    return changed


def _transformed(transforms: Transforms, image: Tensor, target: Target, seed: int) -> tuple[Tensor, Target]:
    """Call the transforms with the types that they dispatch on, and give plain boxes and points back."""
    size = _size(image)
    wrapped = {**target, "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)}
    if "ignore_boxes" in target:
        wrapped["ignore_boxes"] = Regions.of(target["ignore_boxes"], size)
    for key in _own_points(target):
        if target[key].numel():
            wrapped[key] = Points.of(target[key], size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed_image, changed = transforms(tv_tensors.Image(image), wrapped)
    if not isinstance(changed_image, Tensor):
        raise TypeError(f"the transforms returned a {type(changed_image).__name__} as image, not a tensor")
    changed = {
        key: plain(value) if isinstance(value, tv_tensors.TVTensor) and key != "masks" else value
        for key, value in {**changed, "boxes": _returned_boxes(changed["boxes"])}.items()
    }
    if "ignore_boxes" in changed:
        ignored = clip_boxes_to_image(changed["ignore_boxes"], _size(changed_image))
        changed["ignore_boxes"] = ignored[_has_area(ignored)]
    return plain(changed_image), changed


def _returned_boxes(boxes: Tensor) -> Tensor:
    """Return xyxy boxes (G, 4) of what the transforms made of them."""
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        return _xyxy(boxes, boxes.canvas_size, "boxes")
    # Degenerate boxes are marked as such by v2; negative sides are not its doing.
    if (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError(
            "the transforms returned plain boxes that are not xyxy: leave ConvertBoundingBoxFormat or ToPureTensor out"
        )
    return boxes


def _in_step(changed: Target, given: Target) -> tuple[Target, Tensor]:
    """Select the objects that are left from every entry.

    Returns:
        The target with plain masks, and the numbers (G,) of the objects among those given.
    """
    count, left = len(given["boxes"]), len(changed["boxes"])
    masks = changed.get("masks")
    rows = masks.rows if isinstance(masks, Bitmaps | Encoded) else torch.arange(count)
    result: Target = {**changed, "masks": _plain_masks(masks, given["masks"])}
    for key in result.keys() & given.keys() - {"boxes", "masks"}:
        value, before = result[key], given[key]
        if not _is_per_object(key, before, count):
            continue
        if _is_per_object(key, value, count) and (value is before or len(rows) < count):
            result[key] = _rows(value, rows)
        elif not _is_per_object(key, value, left) and key not in _OUTSIDE:
            # v2 selected from it at one time and not at another; its values are no matter of v2's.
            result[key] = _rows(before, rows)
    for key, before in given.items():
        if _is_per_object(key, before, count) and not _is_per_object(key, result.get(key), left):
            raise ValueError(
                f"the transforms left {left} of {count} boxes, but not of {key}: where they select objects, "
                "let them index the boxes and the masks, or leave it to v2.SanitizeBoundingBoxes"
            )
    return result, rows


def _plain_masks(masks: Any, given: EncodedMasks | Tensor) -> Any:
    """Return the masks that came out of the transforms, without their carrier, and bitmaps in the dtype given."""
    if isinstance(masks, Encoded):
        return masks.masks[masks.rows]
    if isinstance(masks, Tensor):
        return plain(masks).to(given.dtype if isinstance(given, Tensor) else torch.uint8)
    return masks


def _mark_outside(changed: Target, given: Target, rows: Tensor, size: Size) -> None:
    """Mark points beyond the border; COCO's keypoints (0, 0, 0), which are not labeled, stay what they are."""
    for key, outside in _OUTSIDE.items():
        points = changed.get(key)
        if points is None or points.ndim != 3 or points.shape[-1] != 3:
            continue
        x, y, mark = points.unbind(dim=-1)
        gone = (x < 0) | (y < 0) | (x > size[1]) | (y > size[0])
        if key == "keypoints":
            gone |= (given[key][rows] == 0).all(dim=-1)
        columns = [
            column if value is None else column.masked_fill(gone, value)
            for column, value in zip((x, y, mark), outside, strict=True)
        ]
        changed[key] = torch.stack(columns, dim=-1)


def _is_per_object(key: str, value: Any, count: int) -> bool:
    """Whether an entry has one value per object."""
    if key in _OF_THE_IMAGE or not isinstance(value, Tensor | np.ndarray | EncodedMasks | list | tuple):
        return False
    if isinstance(value, Tensor | np.ndarray) and not value.ndim:
        return False
    return len(value) == count and not hasattr(value, "_fields")


def _rows(value: Any, rows: Tensor) -> Any:
    """Select rows (int64) of a tensor, an array, encoded masks, a list or a tuple."""
    if isinstance(value, list | tuple):
        return type(value)(value[row] for row in rows.tolist())
    return value[rows.numpy() if isinstance(value, np.ndarray) else rows]
