"""Rasterize polygons as pycocotools does, also those on which its 32-bit integers overflow."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

FloatArray = npt.NDArray[np.float64]

#: Longest outline in px that is passed to pycocotools unclipped. pycocotools stores five points per px (about 100
#: bytes), and counts in 32-bit integers.
_LONGEST_OUTLINE = 2.0**18
#: Largest coordinate in px that is passed to pycocotools unclipped: it counts fifths of a px in 32-bit integers.
_FARTHEST = 2.0**28


def rasterize_polygons(polygons: Sequence[FloatArray], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Rasterize the union of polygons, bit for bit as pycocotools does.

    Outlines too long for pycocotools' integers or for memory, such as those of polygons that reach millions of px
    outside the image, are first clipped to the image plus a margin. Clipping may change the slope of an edge that
    crosses the margin's border, by a fraction of a pixel.

    Args:
        polygons: (V, 2) xy each, in px, finite.
        height: H of the mask.
        width: W of the mask.

    Returns:
        (H, W) uint8 of 0 and 1.

    Example:
        >>> rasterize_polygons([np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]])], 3, 3)
        array([[1, 1, 0],
               [1, 1, 0],
               [0, 0, 0]], dtype=uint8)
    """
    rle = _rle_of_polygons(polygons, height, width)
    if rle is None:
        return np.zeros((height, width), dtype=np.uint8)
    return decode_rle(rle)


def decode_rle(rle: Any) -> npt.NDArray[np.uint8]:
    """Decode an RLE to (H, W) uint8 with pycocotools.

    Example:
        >>> decode_rle({"size": [2, 3], "counts": b"123"})
        array([[0, 1, 0],
               [1, 0, 0]], dtype=uint8)
    """
    try:
        mask: npt.NDArray[np.uint8] = coco_mask.decode(rle)
    except DeprecationWarning:
        # NumPy 2 warns of how pycocotools makes its arrays, and `python -W error` makes an error of that.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return decode_rle(rle)
    except TypeError as error:
        if "__array__" not in str(error):
            raise
        # NumPy 2 calls pycocotools with an argument that it does not know, and then without. An exception that Ctrl-C
        # or SIGTERM raises in between is lost, and that about the argument comes out.
        raise KeyboardInterrupt from None
    return mask


def count_pixels(polygons: Sequence[FloatArray], height: int, width: int) -> int:
    """Return the number of pixels set in the mask of `rasterize_polygons`, without decoding the mask.

    Example:
        >>> count_pixels([np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]])], 3, 3)
        4
    """
    rle = _rle_of_polygons(polygons, height, width)
    return 0 if rle is None else int(coco_mask.area(rle))


def _rle_of_polygons(polygons: Sequence[FloatArray], height: int, width: int) -> Any:
    """Return the union of polygons as pycocotools' RLE, or None if no polygon is near the image."""
    fitting = []
    for polygon in polygons:
        steps = np.abs(np.diff(polygon, axis=0, append=polygon[:1]))
        if not steps.max(axis=1).sum() <= _LONGEST_OUTLINE or np.abs(polygon).max() > _FARTHEST:
            polygon = clip_polygon(polygon, (-width, -height, 2 * width, 2 * height))
        if len(polygon) > 2:
            fitting.append(polygon.reshape(-1).tolist())
    return coco_mask.merge(coco_mask.frPyObjects(fitting, height, width)) if fitting else None


def clip_polygon(polygon: FloatArray, box: tuple[float, float, float, float]) -> FloatArray:
    """Clip a polygon to a box, one side of the box after the other.

    Winding numbers inside the box do not change, even if the polygon crosses itself. Along the box's border the
    clipped polygon may run back and forth.

    Args:
        polygon: (V, 2) xy.
        box: xyxy.

    Returns:
        (V', 2) xy; empty if the polygon and the box do not meet.

    Example:
        >>> square = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 4.0], [0.0, 4.0]])
        >>> clip_polygon(square, (2.0, 2.0, 9.0, 9.0)).tolist()
        [[2.0, 4.0], [2.0, 2.0], [4.0, 2.0], [4.0, 4.0]]

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
        # Two candidates per edge: its crossing with the side, then its end point.
        corners = np.stack([crossing, following], axis=1).reshape(-1, 2)
        polygon = corners[np.stack([inside != next_inside, next_inside], axis=1).reshape(-1)]
    return polygon
