"""Augmentation of images and targets with torchvision.transforms.v2, including every field of the objects.

Masks stay polygons and RLEs under transforms that can move those exactly; other transforms move bitmaps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class ScaleJitter(v2.Transform):
    """Show a random part of the image, or the image in a larger gray frame, so that objects have other sizes.

    This is large-scale jitter for models that resize images themselves: the image is cropped to 1 / s of each side, so
    that the model's resizing shows objects s times as large. For s < 1 it is padded with a frame instead.

    Args:
        low: smallest s, above 0.
        high: largest s. s is uniformly distributed.

    Source: Ghiasi et al., Simple Copy-Paste, 2020, arXiv:2012.07177, section 3.
    """

    _FRAME = 124

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Sample the window: its top, left, height and width in px, in the image's coordinates."""
        image = next(value for value in flat_inputs if isinstance(value, tv_tensors.Image))
        height, width = functional.get_size(image)
        scale, down, across = torch.rand(3).tolist()
        scale = self.low + scale * (self.high - self.low)
        size = [max(round(height / scale), 1), max(round(width / scale), 1)]
        # A random place of the window in the image, or of the image in the window.
        top, left = round(down * (height - size[0])), round(across * (width - size[1]))
        return {"top": top, "left": left, "height": size[0], "width": size[1], "own": (height, width)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop or pad one part of the sample."""
        (own_height, own_width), size = params["own"], (params["height"], params["width"])
        top, left = params["top"], params["left"]
        if size[0] <= own_height and size[1] <= own_width:
            return self._call_kernel(functional.crop, inpt, top, left, *size)
        padding = [-left, -top, size[1] - own_width + left, size[0] - own_height + top]
        fill = self._FRAME if isinstance(inpt, tv_tensors.Image) else 0
        return self._call_kernel(functional.pad, inpt, padding, fill=fill)


def augmentation(
    *,
    horizontal_flip: float,
    photometric_distortion: float,
    scale_jitter: Sequence[float] | None = None,
) -> v2.Transform:
    """Make the augmentation of torchvision's reference recipes; the model's `min_size` jitters the image size.

    Args:
        horizontal_flip: probability in [0, 1].
        photometric_distortion: probability in [0, 1] of each change of brightness, contrast, saturation and hue.
        scale_jitter: smallest and largest factor of the size of objects; None for none. See `ScaleJitter`.
    """
    return v2.Compose(
        [
            *([ScaleJitter(*scale_jitter)] if scale_jitter else []),
            v2.RandomHorizontalFlip(horizontal_flip),
            *([v2.RandomPhotometricDistort(p=photometric_distortion)] if photometric_distortion else []),
        ]
    )


#: Fields that belong to the image, whatever their length.
_OF_THE_IMAGE = ("image_id", "size", "orig_size", "original_size", "image_size", "ignore_boxes")

#: Values of x, y and the third column for points outside the image; None keeps the value.
_OUTSIDE = {"keypoints": (0.0, 0.0, 0.0), "points": (None, None, -1.0)}


def augmented(transforms: Transforms, image: Tensor, target: Target, seed: int) -> tuple[Tensor, Target]:
    """Apply transforms to an image and to every field of its target.

    Horizontal and vertical flips, resizing, scale jitter, crops (including center and IoU crops), padding, zooming out
    and color changes keep encoded masks encoded and exact. Under other transforms, such as a rotation, masks become
    (G, H, W) uint8, and `has_mask` marks the objects without a mask. Masks are filled with 0, whatever the fill of the
    image.

    Args:
        transforms: a torchvision.transforms.v2 transform, or any function of the image and the target. A function that
            selects objects must index the masks along with the boxes.
        image: (3, H, W) uint8 or float.
        target: boxes (G, 4), xyxy in px or `BoundingBoxes` of any format that is not rotated, and any of these:

            - masks: `EncodedMasks`, or a tensor (G, H, W) of 0 and 1.
            - ignore_boxes (I, 4), xyxy in px.
            - keypoints (G, K, 2), or (G, K, 3) with a visibility, and points (G, K, 3) with a label: x and y in px,
              0 at the left and upper border. A flip does not swap left and right keypoints.
            - `KeyPoints`, which v2 itself transforms.
            - Other tensors, arrays and lists. Those with one entry per object lose the entries of dropped objects.
              Their values do not change: `area` stays the annotation's.
        seed: Seed of torch's generator for the transforms. The generator's state is restored afterwards.

    Returns:
        The image, and a new target of plain tensors with xyxy boxes, without the objects whose boxes are outside the
        image. Keypoints outside the image have x, y and visibility 0; points outside have label -1.

    Raises:
        TypeError: the image, masks or points have an unsupported type.
        ValueError: shapes do not match, boxes are rotated, or transforms dropped objects from only some of the fields.
            The message names the field.

    Example:
        >>> image, masks = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.uint8)
        >>> masks[0, 2:6, 2:4] = 1
        >>> boxes, labels = torch.tensor([[2.0, 2.0, 4.0, 6.0]]), torch.tensor([1])
        >>> target = {"boxes": boxes, "labels": labels, "masks": masks}
        >>> flip = v2.RandomHorizontalFlip(p=1.0)
        >>> augmented(flip, image, target, seed=0)[1]["boxes"]
        tensor([[4., 2., 6., 6.]])
    """
    given = _validate(image, target)
    masks, every = given["masks"], torch.arange(len(given["boxes"]))
    try:
        if not isinstance(masks, EncodedMasks):
            raise NeedsPixels
        pixels, changed = _transform(transforms, image, {**given, "masks": Encoded.of(masks, every)}, seed)
    except NeedsPixels:
        given = _with_bitmaps(given)
        bitmaps = Bitmaps.of(given["masks"].to(torch.uint8), every)
        pixels, changed = _transform(transforms, image, {**given, "masks": bitmaps}, seed)
    changed, rows = _select_remaining(changed, given)
    _mark_outside(changed, given, rows, _size(pixels))
    if target.get("masks") is None:
        # Remove the empty masks and has_mask, which were only added to keep track of the objects.
        changed = {key: value for key, value in changed.items() if key in target or key not in given}
        if "masks" in target:
            changed["masks"] = None
    boxes = changed["boxes"] = clip_boxes_to_image(changed["boxes"], _size(pixels))
    kept = torch.where(_has_area(boxes))[0]
    if len(kept) < len(boxes):
        changed = {
            key: _select_rows(value, kept) if _is_per_object(key, value, len(boxes)) else value
            for key, value in changed.items()
        }
    return pixels, changed


def _has_area(boxes: Tensor) -> Tensor:
    """Return which boxes (B, 4) have an area, (B,) bool."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def _size(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]


def _validate(image: Tensor, target: Target) -> Target:
    """Validate the image and target, and return the target with xyxy boxes, a mask per object, and float points."""
    if not isinstance(image, Tensor):
        raise TypeError(
            f"image is a {type(image).__name__}, not a tensor (3, H, W); v2.functional.pil_to_tensor makes one"
        )
    if image.ndim != 3:
        raise ValueError(f"image has the shape {tuple(image.shape)}, not (3, H, W)")
    size = _size(image)
    if "boxes" not in target:
        raise ValueError(f"the target has no boxes, only {sorted(target)}")
    validated = {**target, "boxes": _as_xyxy(target["boxes"], size, "boxes")}
    count = len(validated["boxes"])
    masks = target.get("masks")
    if masks is None:
        masks = EncodedMasks.of_checked([None] * count, *size)
    elif not isinstance(masks, EncodedMasks | Tensor):
        raise TypeError(f"masks are a {type(masks).__name__}, not EncodedMasks or a tensor (G, H, W)")
    if tuple(masks.shape) != (count, *size):
        raise ValueError(
            f"masks have the shape {tuple(masks.shape)}, not {(count, *size)} as required by the {count} boxes and the "
            "image"
        )
    validated["masks"] = masks
    if "ignore_boxes" in target:
        validated["ignore_boxes"] = _as_xyxy(target["ignore_boxes"], size, "ignore_boxes")
    for key in _point_fields(target):
        validated[key] = _as_points(target[key], count, key)
    return validated


def _point_fields(target: Target) -> list[str]:
    """Return the names of the fields of points that move like box corners: all except v2's `KeyPoints`."""
    return [key for key in _OUTSIDE if key in target and not isinstance(target[key], tv_tensors.KeyPoints)]


def _as_float(tensor: Tensor) -> Tensor:
    """Convert an integer tensor to float, so that resizing and rotating do not truncate its values."""
    return tensor if tensor.is_floating_point() else tensor.float()


def _as_xyxy(boxes: Tensor, size: Size, name: str) -> Tensor:
    """Convert boxes of any format to a plain float tensor of xyxy boxes."""
    if not isinstance(boxes, Tensor):
        raise TypeError(f"{name} are a {type(boxes).__name__}, not a tensor (G, 4)")
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        if boxes.shape[-1] != 4:
            raise ValueError(f"{name} are rotated ({boxes.format.value}), not boxes of four numbers")
        floats = tv_tensors.wrap(_as_float(plain(boxes)), like=boxes)
        boxes = functional.convert_bounding_box_format(floats, new_format=tv_tensors.BoundingBoxFormat.XYXY)
    boxes = _as_float(plain(boxes))
    if not boxes.numel():
        return boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name} have the shape {tuple(boxes.shape)}, not (G, 4)")
    return boxes


def _as_points(points: Tensor, count: int, name: str) -> Tensor:
    if not isinstance(points, Tensor):
        raise TypeError(f"{name} are a {type(points).__name__}, not a tensor ({count}, K, 3)")
    if points.numel() and (points.ndim != 3 or len(points) != count or points.shape[2] not in (2, 3)):
        raise ValueError(
            f"{name} have the shape {tuple(points.shape)}, not ({count}, K, 3) or ({count}, K, 2)"
        )
    return _as_float(plain(points))


def _with_bitmaps(target: Target) -> Target:
    """Return the target with masks (G, H, W), and has_mask if an object has none: bitmaps cannot represent that."""
    masks = target["masks"]
    if isinstance(masks, Tensor):
        return target
    has_mask = torch.tensor([masks.has_mask(index) for index in range(len(masks))], dtype=torch.bool)
    changed = {**target, "masks": masks.bitmaps()}
    if not has_mask.all():
        changed["has_mask"] = has_mask & torch.as_tensor(target.get("has_mask", has_mask))
    return changed


def _transform(transforms: Transforms, image: Tensor, target: Target, seed: int) -> tuple[Tensor, Target]:
    """Apply the transforms to a target wrapped in the types that they dispatch on, and unwrap all but the masks."""
    size = _size(image)
    wrapped = {**target, "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)}
    if "ignore_boxes" in target:
        wrapped["ignore_boxes"] = Regions.of(target["ignore_boxes"], size)
    for key in _point_fields(target):
        if target[key].numel():
            wrapped[key] = Points.of(target[key], size)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed also seeds the generators of all GPUs, whose state is not restored here.
        torch.default_generator.manual_seed(seed)
        changed_image, changed = transforms(tv_tensors.Image(image), wrapped)
    if not isinstance(changed_image, Tensor):
        raise TypeError(f"the transforms returned a {type(changed_image).__name__} as image, not a tensor")
    changed = {
        key: plain(value) if isinstance(value, tv_tensors.TVTensor) and key != "masks" else value
        for key, value in {**changed, "boxes": _unwrap_boxes(changed["boxes"])}.items()
    }
    if "ignore_boxes" in changed:
        ignored = clip_boxes_to_image(changed["ignore_boxes"], _size(changed_image))
        changed["ignore_boxes"] = ignored[_has_area(ignored)]
    return plain(changed_image), changed


def _unwrap_boxes(boxes: Tensor) -> Tensor:
    """Convert the boxes that the transforms returned to plain xyxy boxes (G, 4)."""
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        return _as_xyxy(boxes, boxes.canvas_size, "boxes")
    # v2 itself makes no boxes with negative sides, so these must be in another format.
    if (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError(
            "the transforms returned plain boxes that are not xyxy: leave ConvertBoundingBoxFormat or ToPureTensor out"
        )
    return boxes


def _select_remaining(changed: Target, given: Target) -> tuple[Target, Tensor]:
    """Select the objects that the transforms kept from every field.

    Returns:
        The target with plain masks, and the indices (G,) of the kept objects in the given target.
    """
    count, left = len(given["boxes"]), len(changed["boxes"])
    masks = changed.get("masks")
    rows = masks.rows if isinstance(masks, Bitmaps | Encoded) else torch.arange(count)
    result: Target = {**changed, "masks": _unwrap_masks(masks, given["masks"])}
    for key in result.keys() & given.keys() - {"boxes", "masks"}:
        value, before = result[key], given[key]
        if not _is_per_object(key, before, count):
            continue
        if _is_per_object(key, value, count) and (value is before or len(rows) < count):
            result[key] = _select_rows(value, rows)
        elif not _is_per_object(key, value, left) and key not in _OUTSIDE:
            # Some of the transforms selected rows of this field and others did not. Its values did not change, so
            # select the rows from the given field.
            result[key] = _select_rows(before, rows)
    for key, before in given.items():
        if _is_per_object(key, before, count) and not _is_per_object(key, result.get(key), left):
            raise ValueError(
                f"the transforms kept {left} of {count} boxes, but not of {key}: a transform that selects objects must "
                "index the boxes and the masks; v2.SanitizeBoundingBoxes does"
            )
    return result, rows


def _unwrap_masks(masks: Any, given: EncodedMasks | Tensor) -> Any:
    """Unwrap the masks that the transforms returned, with bitmaps in the dtype of the given masks."""
    if isinstance(masks, Encoded):
        return masks.masks[masks.rows]
    if isinstance(masks, Tensor):
        return plain(masks).to(given.dtype if isinstance(given, Tensor) else torch.uint8)
    return masks


def _mark_outside(changed: Target, given: Target, rows: Tensor, size: Size) -> None:
    """Mark the points outside the image; keypoints that COCO has as unlabeled, (0, 0, 0), stay (0, 0, 0)."""
    for key, outside in _OUTSIDE.items():
        points = changed.get(key)
        if points is None or points.ndim != 3 or points.shape[-1] != 3:
            continue
        x, y, mark = points.unbind(dim=-1)
        is_outside = (x < 0) | (y < 0) | (x > size[1]) | (y > size[0])
        if key == "keypoints":
            is_outside |= (given[key][rows] == 0).all(dim=-1)
        columns = [
            column if value is None else column.masked_fill(is_outside, value)
            for column, value in zip((x, y, mark), outside, strict=True)
        ]
        changed[key] = torch.stack(columns, dim=-1)


def _is_per_object(key: str, value: Any, count: int) -> bool:
    """Return whether a field has one value per object."""
    if key in _OF_THE_IMAGE or not isinstance(value, Tensor | np.ndarray | EncodedMasks | list | tuple):
        return False
    if isinstance(value, Tensor | np.ndarray) and not value.ndim:
        return False
    return len(value) == count and not hasattr(value, "_fields")


def _select_rows(value: Any, rows: Tensor) -> Any:
    """Select rows (int64) of a tensor, an array, encoded masks, a list or a tuple."""
    if isinstance(value, list | tuple):
        return type(value)(value[row] for row in rows.tolist())
    return value[rows.numpy() if isinstance(value, np.ndarray) else rows]
