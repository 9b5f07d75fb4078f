"""Conventions of coordinates: which one boxes and polygons follow, judged by all of a file together."""

from __future__ import annotations

from typing import Any

import numpy as np

from maskloss.data.records import BoolArray
from maskloss.masks.encoded import FloatArray, IntArray

#: How far boxes and polygons may reach beyond the image without a warning, in px. COCO's own do, because of rounding.
BORDER_TOLERANCE = 1.0
#: Probability up to which it is no coincidence that all objects lie in the top left 100 x 100 px of their images.
_MAX_COINCIDENCE = 1e-9


def xyxy_of(boxes: FloatArray) -> FloatArray:
    """Convert boxes (R, 4) from x, y, width, height to xyxy."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def distance_beyond(corners: FloatArray, sizes: FloatArray) -> FloatArray:
    """Return how far xyxy boxes reach beyond the image, in px, (R,)."""
    return np.maximum(-corners[:, :2], corners[:, 2:] - sizes).max(axis=1, initial=-np.inf)


def box_readings(boxes: FloatArray, sizes: FloatArray) -> dict[str, tuple[FloatArray, ...]]:
    """Convert boxes to xyxy from each of the conventions of other formats.

    Args:
        boxes: (R, 4) as in the file.
        sizes: (R, 2) width and height of the images.

    Returns:
        For the name of each convention, x1, y1, x2 and y2, (R,) each.
    """
    a, b, c, d = boxes.T
    width, height = sizes.T
    return {
        "x1, y1, x2, y2": (a, b, c, d),
        "center x, center y, width, height": (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
        "y1, x1, y2, x2": (b, a, d, c),
        "y, x, height, width": (b, a, b + d, a + c),
        "fractions x, y, width, height": (a * width, b * height, (a + c) * width, (b + d) * height),
        "fractions x1, y1, x2, y2": (a * width, b * height, c * width, d * height),
        "fractions of center x, center y, width, height": (
            (a - c / 2) * width,
            (b - d / 2) * height,
            (a + c / 2) * width,
            (b + d / 2) * height,
        ),
    }


def suspected_convention(boxes: FloatArray, extents: FloatArray, sizes: FloatArray) -> tuple[str, int] | None:
    """Return which convention boxes follow if it is not x, y, width, height, judged by their masks.

    Args:
        boxes: (R, 4) as in the file.
        extents: (R, 4) xyxy of their masks.
        sizes: (R, 2) width and height of the images.

    Returns:
        None if the boxes are x, y, width, height. Otherwise the name of the convention, and how many boxes fit their
        masks in it; if no known convention fits, "" and how many boxes are far from their masks.
    """
    if not len(boxes):
        return None
    readings = box_readings(boxes, sizes)
    # A box may fit the whole mask, or the part of it inside the image.
    inside = np.clip(extents, 0, np.tile(sizes, 2))
    longest = (extents[:, 2:] - extents[:, :2]).max(axis=1)

    def fits(reading: Any, tolerance: FloatArray) -> BoolArray:
        corners = np.stack(reading, axis=1)
        distance = np.minimum(np.abs(corners - extents).max(axis=1), np.abs(corners - inside).max(axis=1))
        fitting: BoolArray = (distance <= tolerance) & (corners[:, 2:] > corners[:, :2]).all(axis=1)
        return fitting

    usual = xyxy_of(boxes)
    fitting = fits(usual.T, np.maximum(2.0, 0.03 * longest))
    # A small box fits nearly any reading by chance, so the other readings have to fit more closely.
    close = np.minimum(np.maximum(1.5, 0.03 * longest), 0.05 * longest)
    # A box at the image's top left corner is the same in several conventions, so only the other boxes count.
    best, most = "", 0
    for name, reading in readings.items():
        votes = int((fits(reading, close) & ~fitting).sum())
        if votes > most:
            best, most = name, votes
    if most:
        other = fits(readings[best], close)
        if most >= 0.8 * (len(boxes) - int(fitting.sum())) and most > 4 * int((fitting & ~other).sum()):
            return best, int(other.sum())
    overlap, union = _overlap_and_union(usual, extents)
    # Boxes drawn apart from the masks fit none closely, but overlap them far more in the convention that they follow.
    if len(boxes) >= 5 and fitting.mean() < 0.2:
        for name, reading in readings.items():
            common, joint = _overlap_and_union(np.stack(reading, axis=1), extents)
            better = common / joint > overlap / union + 0.1
            if np.median(common / joint) >= 0.6 and better.mean() >= 0.9:
                return name, int((common >= 0.5 * joint).sum())
    # A few loose boxes in a small data set prove nothing; require nearly all boxes to be far from their masks.
    inside_box = overlap >= 0.9 * (extents[:, 2:] - extents[:, :2]).prod(axis=1)
    num_far = int(((overlap < 0.1 * union) & ~inside_box).sum())
    if len(boxes) > 1 and num_far >= 0.8 * len(boxes):
        return "", num_far
    # Boxes of no convention may overlap their masks by chance, and large ones contain them.
    num_apart = int(((overlap < 0.3 * union) & ~inside_box).sum())
    return (
        ("", num_apart) if len(boxes) >= 10 and not fitting.any() and num_apart >= 0.3 * len(boxes) else None
    )


def _overlap_and_union(boxes: FloatArray, extents: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the areas of the overlap and of the union of each xyxy box with the extent of its mask, (R,) each."""
    corners = np.minimum(boxes[:, 2:], extents[:, 2:]) - np.maximum(boxes[:, :2], extents[:, :2])
    overlap = np.clip(corners, 0, None).prod(axis=1)
    areas = [np.clip(these[:, 2:] - these[:, :2], 0, None).prod(axis=1) for these in (boxes, extents)]
    return overlap, np.maximum(areas[0] + areas[1] - overlap, 1e-9)


def look_like_corners(boxes: FloatArray, sizes: FloatArray) -> bool:
    """Return whether boxes without masks look like xyxy: all are inside as xyxy, most reach beyond as xywh.

    Args:
        boxes: (R, 4) as in the file.
        sizes: (R, 2) width and height of the images.
    """
    inside = distance_beyond(boxes, sizes) <= BORDER_TOLERANCE
    ordered = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    reaching = distance_beyond(xyxy_of(boxes), sizes) > BORDER_TOLERANCE
    return len(boxes) > 1 and bool((inside & ordered).all()) and reaching.mean() >= 0.5


def look_like_percentages(corners: FloatArray, image: IntArray, sizes: FloatArray) -> bool:
    """Return whether coordinates from 0 to 100 are percentages of the image, and not px of its top left corner.

    They are if it would be an improbable coincidence that all objects are in that corner, and nearly reach the other
    two sides of it. In px, all objects may be in the corner, such as logos, but hardly end where percentages do. The
    objects of an image are counted as one, because they may be close to each other.

    Args:
        corners: (R, 4) xyxy of polygons or boxes, from 0 to 100.
        image: (R,) index of the image of each.
        sizes: (R, 2) width and height of the images.
    """
    _, first = np.unique(image, return_index=True)
    probability = np.minimum(100 / sizes[first], 1).prod()
    reach = corners.reshape(-1, 2, 2).max(axis=(0, 1))
    # Numbers from 90 on become more than 100 px in these images, so that repaired files are not converted again.
    return bool(sizes.min() >= 200 and (reach >= 90).all() and probability <= _MAX_COINCIDENCE)
