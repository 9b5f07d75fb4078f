"""Polygons as pycocotools rasterizes them, without what it cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

FloatArray = npt.NDArray[np.float64]

#: Length of an outline in px that pycocotools is given as it is. It holds five points for each px, some 100 bytes, and
#: counts in 32-bit integers.
_LONGEST_OUTLINE = 2.0**18
#: Largest coordinate in px that it is given: it counts fifths of them.
_FARTHEST = 2.0**28


def rasterize_polygons(polygons: Sequence[FloatArray], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return the mask of the union of polygons, bit for bit as pycocotools makes it.

    An outline that is too long for pycocotools' integers or for memory, such as that of a polygon that reaches millions
    of px outside of the image, is cut to the image and a margin first. Where an edge crosses the margin's border, that
    may turn its slope by a part of a pixel.

    Args:
        polygons: (V, 2) xy each, in px, finite.
        height: H, of the mask.
        width: W, of the mask.

    Returns:
        (H, W) of 0 and 1.
    """
    rle = _rle_of_polygons(polygons, height, width)
    if rle is None:
        return np.zeros((height, width), dtype=np.uint8)
    mask: npt.NDArray[np.uint8] = coco_mask.decode(rle)
    return mask


def count_pixels(polygons: Sequence[FloatArray], height: int, width: int) -> int:
    """Return how many pixels the mask of `rasterize_polygons` has, without making it."""
    rle = _rle_of_polygons(polygons, height, width)
    return 0 if rle is None else int(coco_mask.area(rle))


def _rle_of_polygons(polygons: Sequence[FloatArray], height: int, width: int) -> Any:
    """Return the union of polygons as pycocotools' RLE; None if nothing of them is near the image."""
    fitting = []
    for polygon in polygons:
        steps = np.abs(np.diff(polygon, axis=0, append=polygon[:1]))
        if not steps.max(axis=1).sum() <= _LONGEST_OUTLINE or np.abs(polygon).max() > _FARTHEST:
            polygon = clip_polygon(polygon, (-width, -height, 2 * width, 2 * height))
        if len(polygon) > 2:
            fitting.append(polygon.reshape(-1).tolist())
    return coco_mask.merge(coco_mask.frPyObjects(fitting, height, width)) if fitting else None


def clip_polygon(polygon: FloatArray, box: tuple[float, float, float, float]) -> FloatArray:
    """Cut a polygon to a box, side by side.

    Inside of the box it surrounds each point as often as before, also where it crosses itself; along the box's border
    it may run to and fro.

    Args:
        polygon: (V, 2) xy.
        box: xyxy.

    Returns:
        (V', 2) xy; empty where the polygon and the box do not meet.

    Source: Sutherland and Hodgman, Reentrant polygon clipping, 1974.
    """
    for axis, limit, sign in ((0, box[0], 1.0), (1, box[1], 1.0), (0, box[2], -1.0), (1, box[3], -1.0)):
        if not len(polygon):
            break
        following = np.roll(polygon, -1, axis=0)
        depth, next_depth = (sign * (points[:, axis] - limit) for points in (polygon, following))
        inside, next_inside = depth >= 0, next_depth >= 0
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (depth / (depth - next_depth))[:, None]
            crossing = polygon + share * (following - polygon)
        crossing[:, axis] = limit
        # Of each edge: where it crosses the side, then its end.
        corners = np.stack([crossing, following], axis=1).reshape(-1, 2)
        polygon = corners[np.stack([inside != next_inside, next_inside], axis=1).reshape(-1)]
    return polygon
