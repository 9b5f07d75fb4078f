"""Copy-paste augmentation: paste objects of one image over another, and cut what they cover out of its masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from maskloss.data.augmentation import Target
from maskloss.masks.encoded import EncodedMasks

#: Fields with one entry per object, and the value for objects of a target that lacks the field.
_PER_OBJECT: dict[str, Any] = {"has_mask": True, "weights": 1.0, "points": -1.0}


def paste_objects(
    image: Tensor, target: Target, source: Tensor, source_target: Target, seed: int
) -> tuple[Tensor, Target]:
    """Paste a random half of the objects of another image, at a random place, and cut away what they cover.

    The masks are exactly those of the composed image: a pasted object has the pixels that were pasted, and an object
    under it loses these pixels and gets the box of what remains. Masks that change become RLEs. Objects that are
    covered completely are dropped, and labeled points that are covered lose their label. Objects without a mask are
    not pasted.

    Args:
        image: (3, H, W) uint8 or float.
        target: boxes (G, 4), labels (G,), masks, and optionally has_mask, weights and points, as in `CocoDataset`.
        source: (3, H', W') of the same dtype.
        source_target: the same for the other image.
        seed: seed of the choice of the objects and of the place.

    Returns:
        The composed image and its target; the given ones if nothing was pasted.

    Example:
        >>> from maskloss import EncodedMasks
        >>> def sample(value, box):
        ...     x0, y0, x1, y1 = box
        ...     masks = EncodedMasks([[[x0, y0, x1, y0, x1, y1, x0, y1]]], height=8, width=8)
        ...     image = torch.full((3, 8, 8), value, dtype=torch.uint8)
        ...     return image, {"boxes": torch.tensor([box]).float(), "labels": torch.tensor([1]), "masks": masks}
        >>> _, target = paste_objects(*sample(0, [0, 0, 4, 4]), *sample(9, [2, 0, 6, 4]), seed=0)
        >>> target["boxes"].tolist()
        [[0.0, 0.0, 2.0, 4.0], [2.0, 0.0, 6.0, 4.0]]

    Source: Ghiasi et al., Simple Copy-Paste, 2020, arXiv:2012.07177, section 3, without blending, which it found to
    make no difference.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = _choice(source_target, generator)
    size = (image.shape[-2], image.shape[-1])
    source_size = (source.shape[-2], source.shape[-1])
    top, left = (
        _random_place(large, small, generator) for large, small in zip(size, source_size, strict=True)
    )
    bitmaps = torch.zeros(len(rows), *size, dtype=torch.bool)
    here, there = _overlap(top, left, size, source_size)
    own = _bitmaps(source_target["masks"], rows)
    bitmaps[:, here[0], here[1]] = own[:, there[0], there[1]]
    visible = bitmaps.flatten(1).any(dim=1)
    is_cut = (bitmaps.sum(dim=(1, 2)) < own.sum(dim=(1, 2)))[visible]
    rows, bitmaps = rows[visible], bitmaps[visible]
    if len(rows) == 0:
        return image, target
    pasted = bitmaps.any(dim=0)
    composed = image.clone()
    composed[:, here[0], here[1]] = torch.where(
        pasted[here[0], here[1]], source[:, there[0], there[1]], image[:, here[0], here[1]]
    )
    kept, boxes, masks = _uncovered(target, pasted)
    offset = torch.tensor([left, top, left, top])
    moved = [
        _extent(bitmap) if cut else _box_inside(box + offset, bitmap)
        for box, bitmap, cut in zip(source_target["boxes"][rows], bitmaps, is_cut, strict=True)
    ]
    result = {
        **target,
        "boxes": torch.cat([boxes, torch.stack(moved).to(boxes.dtype)]),
        "labels": torch.cat([target["labels"][kept], source_target["labels"][rows]]),
        "masks": _joined_masks(masks, bitmaps, size),
    }
    result.update(_other_fields(target, source_target, kept, rows, (top, left), pasted))
    return composed, result


def _box_inside(box: Tensor, bitmap: Tensor) -> Tensor:
    """Return a pasted object's box inside the image, since boxes may be larger than their masks."""
    clipped = clip_boxes_to_image(box, (bitmap.shape[0], bitmap.shape[1]))
    has_area = bool((clipped[2:] > clipped[:2]).all())
    return clipped if has_area else _extent(bitmap).to(box.dtype)


def _choice(target: Target, generator: torch.Generator) -> Tensor:
    """Return the rows (P,) of a random half of the objects that have a mask, at least one if there is one."""
    masks = target["masks"]
    has_mask = torch.as_tensor(target.get("has_mask", torch.ones(len(target["boxes"]), dtype=torch.bool)))
    if isinstance(masks, EncodedMasks):
        own = torch.tensor([masks.has_mask(row) for row in range(len(masks))], dtype=torch.bool)
        has_mask = has_mask & own
    rows = torch.where(has_mask)[0]
    if len(rows) == 0:
        return rows
    chosen = torch.rand(len(rows), generator=generator) < 0.5
    if not chosen.any():
        chosen[int(torch.randint(len(rows), (1,), generator=generator))] = True
    return rows[chosen]


def _random_place(size: int, source_size: int, generator: torch.Generator) -> int:
    """Return where the other image begins along one axis: inside this image, or around it if it is larger."""
    room = size - source_size
    place = int(torch.randint(abs(room) + 1, (1,), generator=generator))
    return place if room >= 0 else -place


def _overlap(
    top: int, left: int, size: tuple[int, int], source_size: tuple[int, int]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the rows and columns in which both images have pixels, in this image and in the other one."""
    here, there = [], []
    for first, length, own in zip((top, left), size, source_size, strict=True):
        start, stop = max(first, 0), min(first + own, length)
        here.append(slice(start, stop))
        there.append(slice(start - first, stop - first))
    return (here[0], here[1]), (there[0], there[1])


def _bitmaps(masks: EncodedMasks | Tensor, rows: Tensor) -> Tensor:
    """Return the bitmaps (P, H, W) bool of some objects."""
    selected = masks[rows]
    return (selected.bitmaps() if isinstance(selected, EncodedMasks) else selected).bool()


def _uncovered(target: Target, pasted: Tensor) -> tuple[Tensor, Tensor, list[Any]]:
    """Cut what was pasted (H, W) from the objects of a target.

    Returns:
        The rows (K,) of the objects that remain, their boxes (K, 4), and their masks: each a bitmap (H, W) bool,
        polygons, or None for an object without a mask.
    """
    masks = target["masks"]
    encoded = isinstance(masks, EncodedMasks)
    kept: list[int] = []
    boxes: list[Tensor] = []
    remaining: list[Any] = []
    for row, box in enumerate(target["boxes"]):
        x0, y0 = (max(int(value), 0) for value in box[:2].floor())
        x1, y1 = (int(value) for value in box[2:].ceil())
        under = pasted[y0:y1, x0:x1]
        if encoded and not masks.has_mask(row):
            if not under.numel() or not under.all():
                kept.append(row)
                boxes.append(box)
                remaining.append(None)
            continue
        if encoded and not masks.is_rle(row) and not under.any():
            mask: Any = [polygon.reshape(-1) for polygon in masks.polygons(row)]
        else:
            mask = _bitmaps(masks, torch.tensor([row]))[0]
            if (mask & pasted).any():
                mask = mask & ~pasted
                if not mask.any():
                    continue
                box = _extent(mask).to(box.dtype)
        kept.append(row)
        boxes.append(box)
        remaining.append(mask)
    stacked = torch.stack(boxes) if boxes else target["boxes"].new_zeros((0, 4))
    return torch.tensor(kept, dtype=torch.int64), stacked, remaining


def _extent(mask: Tensor) -> Tensor:
    """Return the tight box (4,) of a bitmap that is not empty."""
    rows, columns = torch.where(mask.any(dim=1))[0], torch.where(mask.any(dim=0))[0]
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def _joined_masks(masks: list[Any], pasted: Tensor, size: tuple[int, int]) -> EncodedMasks:
    segmentations = [
        coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        if isinstance(mask, Tensor)
        else mask
        for mask in [*masks, *pasted]
    ]
    return EncodedMasks.of_checked(segmentations, *size)


def _other_fields(
    target: Target,
    source_target: Target,
    kept: Tensor,
    rows: Tensor,
    place: tuple[int, int],
    pasted: Tensor,
) -> Target:
    """Join the optional fields of both targets; an object of a target without the field gets its usual value."""
    joined: Target = {}
    for key, usual in _PER_OBJECT.items():
        values = [given.get(key) for given in (target, source_target)]
        if all(value is None for value in values):
            continue
        like = next(value for value in values if value is not None)
        most = max(value.shape[1] for value in values if value is not None) if key == "points" else 0
        parts = []
        for value, own in zip(values, (kept, rows), strict=True):
            if key != "points":
                parts.append(
                    torch.full((len(own),), usual, dtype=like.dtype) if value is None else value[own]
                )
                continue
            padded = like.new_full((len(own), most, 3), usual)
            if value is not None:
                padded[:, : value.shape[1]] = value[own]
            parts.append(padded)
        if key == "points":
            parts = [_without_covered(parts[0], pasted), _moved(parts[1], place, pasted)]
        joined[key] = torch.cat(parts)
    return joined


def _without_covered(points: Tensor, pasted: Tensor) -> Tensor:
    """Remove the labels of points (K, N, 3) that something was pasted over."""
    x, y, label = points.unbind(dim=-1)
    column = x.floor().long().clamp(0, pasted.shape[1] - 1)
    row = y.floor().long().clamp(0, pasted.shape[0] - 1)
    return torch.stack([x, y, torch.where(pasted[row, column], -1.0, label)], dim=-1)


def _moved(points: Tensor, place: tuple[int, int], pasted: Tensor) -> Tensor:
    """Move points (K, N, 3) with their image, and remove the labels of those that are outside.

    The background around a pasted object is not pasted, but a point outside the object is still outside it.
    """
    x, y, label = points.unbind(dim=-1)
    x, y = x + place[1], y + place[0]
    inside = (x >= 0) & (y >= 0) & (x <= pasted.shape[1]) & (y <= pasted.shape[0])
    return torch.stack([x, y, torch.where(inside, label, -1.0)], dim=-1)
