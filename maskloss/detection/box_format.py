"""The format of boxes, judged by the masks of their objects."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import box_convert

from maskloss.detection.target_errors import Target
from maskloss.masks.encoded import EncodedMasks

#: Maximum distance between the sides of a box and of its mask, in px and relative to the mask's side.
_FIT_PIXELS, _FIT_SHARE = 2.0, 0.05


#: Formats of boxes: the name, the conversion to corners, and how a user writes it.
_FORMATS: tuple[tuple[str, Callable[[Tensor], Tensor], str], ...] = (
    ("corners", lambda boxes: boxes, ""),
    (
        "x, y, width, height",
        lambda boxes: box_convert(boxes, "xywh", "xyxy"),
        'torchvision.ops.box_convert(boxes, "xywh", "xyxy")',
    ),
    (
        "center x, center y, width, height",
        lambda boxes: box_convert(boxes, "cxcywh", "xyxy"),
        'torchvision.ops.box_convert(boxes, "cxcywh", "xyxy")',
    ),
    # As in TensorFlow and matterport.
    ("y1, x1, y2, x2", lambda boxes: boxes[:, [1, 0, 3, 2]], "boxes[:, [1, 0, 3, 2]]"),
)


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
    for words, to_corners, convert in _FORMATS:
        read = to_corners(boxes) * size if in_fractions else to_corners(boxes)
        if _fits(read, extents).all():
            steps = [f"{convert} converts them"] if convert else []
            steps += [f"multiply them by {width}, {height}, {width}, {height}"] if in_fractions else []
            unit = "fractions of the image" if in_fractions else "px"
            way_out = ", then ".join(steps)
            return f"the masks show that the boxes are {words} in {unit}, not x1, y1, x2, y2 in px; {way_out}"
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
