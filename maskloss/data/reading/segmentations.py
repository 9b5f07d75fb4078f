"""Validation of the polygons and RLEs of an annotation file, vectorized over all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from maskloss.data.findings import LEFT_OUT, Kind
from maskloss.data.reading.annotation_table import AnnotationTable
from maskloss.data.reading.columns import SPELLINGS
from maskloss.data.reading.conventions import (
    BORDER_TOLERANCE,
    distance_beyond,
)
from maskloss.data.reading.entries import RLE_SIZE, BadEntry, read_segmentation
from maskloss.data.records import POLYGONS, RLE, polygon_extents
from maskloss.masks.coco_format import count_pixels
from maskloss.masks.coverage import union_area
from maskloss.masks.encoded import FloatArray, IntArray, are_canonical

#: Largest plausible distance of a polygon from the image, in multiples of the image's longer side.
_MAX_DISTANCE = 10
#: Smallest share of a mask's area inside the image; with less, the object is assumed to belong to another image.
_MIN_SHARE_INSIDE = 0.05
#: Area in px² up to which a polygon is degenerate.
NO_AREA = 1e-9
DEGENERATE = Kind("degenerate", "annotation", False, "annotations whose mask has no area are left out")
DEGENERATE_PART = Kind(
    "degenerate_part", "annotation", False, "annotations lose their degenerate polygons and keep the others"
)
NOT_FINITE = Kind(
    "not_finite",
    "annotation",
    True,
    "segmentations with a coordinate that is not finite",
    "`maskloss repair` keeps their boxes without them",
)
OUTSIDE = Kind("outside", "annotation", True, "annotations that reach far outside their image", LEFT_OUT)
CLIPPED_MASK = Kind(
    "clipped_mask",
    "annotation",
    False,
    "segmentations that reach beyond the image's border are clipped there",
)


def measure_polygons(table: AnnotationTable) -> None:
    """Compute the extents and areas of polygons, and remove degenerate polygons."""
    is_polygons = table.form == POLYGONS
    rows = np.nonzero(is_polygons)[0]
    owner = np.repeat(rows, table.part_count[rows])
    low, high = polygon_extents(table.coordinates, table.point_first, table.point_count)
    area = _polygon_areas(table.coordinates, table.point_first, table.point_count)
    finite = np.isfinite(low).all(axis=1) & np.isfinite(high).all(axis=1)
    infinite = np.unique(owner[~finite & table.kept[owner]])
    table.drop(
        NOT_FINITE, infinite, lambda row: "segmentation: a polygon has a coordinate that is not finite"
    )
    limit = (_MAX_DISTANCE + 1) * table.sizes().max(axis=1)[owner]
    used = finite & table.kept[owner]
    far = used & ((low.min(axis=1) < -limit) | (high.max(axis=1) > limit)) if len(owner) else used
    for row in np.unique(owner[far]).tolist():
        parts = slice(table.part_first[row], table.part_first[row] + table.part_count[row])
        table.report(OUTSIDE, row, _outside_text(table, row, low[parts].min(axis=0), high[parts].max(axis=0)))
        table.kept[row] = False
    # A figure of eight has a signed area of zero, but covers pixels.
    extent = (high - low).prod(axis=1)
    small = finite & table.kept[owner] & (area <= 1e-6 * extent + NO_AREA)
    good = np.ones(len(owner), dtype=bool)
    for part in np.nonzero(small)[0]:
        first, count = table.point_first[part], table.point_count[part]
        area[part] = union_area([table.coordinates[first : first + count].reshape(-1, 2)])
        good[part] = area[part] > NO_AREA
    total = np.bincount(owner, minlength=len(is_polygons))
    left = np.bincount(owner[good], minlength=len(is_polygons))
    lost = total - left
    for row, count in table.columns.degenerate.items():
        lost[row] += count
    emptied = is_polygons & (left == 0) & table.kept
    table.drop(DEGENERATE, np.nonzero(emptied)[0], lambda row: _degenerate_text(int(total[row])))
    for row in np.nonzero((lost > 0) & table.kept)[0].tolist():
        count = int(lost[row])
        what = "a degenerate polygon is" if count == 1 else f"{count} degenerate polygons are"
        table.report(DEGENERATE_PART, row, f"segmentation: {what} left out")
    if not good.all():
        table.point_first, table.point_count, owner = (
            table.point_first[good],
            table.point_count[good],
            owner[good],
        )
        low, high, area = low[good], high[good], area[good]
        table.part_count = np.where(is_polygons, left, table.part_count)
        table.part_first = np.where(is_polygons, left.cumsum() - left, 0)
    for side, function, corners in ((0, np.minimum, low), (2, np.maximum, high)):
        ends: FloatArray = np.full((len(is_polygons), 2), np.inf if side == 0 else -np.inf)
        function.at(ends, owner, corners)
        table.extents[is_polygons, side : side + 2] = ends[is_polygons]
    table.shoelace[is_polygons] = np.bincount(owner, area, len(is_polygons))[is_polygons]


def _degenerate_text(parts: int) -> str:
    reason = "a polygon has no area" if parts else "a polygon has fewer than 3 points"
    return f"segmentation: {reason}; the annotation is left out"


def _outside_text(table: AnnotationTable, row: int, low: Any, high: Any) -> str:
    width, height = table.size(row)
    return (
        f"segmentation: a polygon reaches outside the image of {width} x {height} (width x height): "
        f"x {low[0]:g} to {high[0]:g}, y {low[1]:g} to {high[1]:g}"
    )


def _polygon_areas(coordinates: FloatArray, first: IntArray, count: IntArray) -> FloatArray:
    """Return each polygon's area by the shoelace formula, (P,); the polygons' coordinates must be contiguous."""
    area = np.empty(len(first))
    chunk = 50_000
    for start in range(0, len(first), chunk):
        part = slice(start, min(start + chunk, len(first)))
        begin, end = first[part][0], first[part][-1] + count[part][-1]
        points = coordinates[begin:end].reshape(-1, 2)
        heads, lengths = (first[part] - begin) // 2, count[part] // 2
        # Relative to the polygon's first point, to keep the precision of the sum.
        x, y = (points - np.repeat(points[heads], lengths, axis=0)).T
        following = np.arange(1, len(points) + 1)
        following[heads + lengths - 1] = heads
        area[part] = np.abs(np.add.reduceat(x * y[following] - x[following] * y, heads)) / 2
    return area


def measure_rles(table: AnnotationTable) -> None:
    """Compute the extents and areas of RLEs, and drop those that are corrupt or have another size than their image."""
    sizes = np.array(table.columns.rle_sizes, dtype=np.int64).reshape(-1, 2)
    _normalize_rles(table, sizes)
    rows = np.nonzero(table.kept & (table.form == RLE))[0]
    given = sizes[table.rle_index[rows]]
    differs = (given[:, ::-1] != table.sizes()[rows]).any(axis=1)
    for row, size in zip(rows[differs].tolist(), given[differs].tolist(), strict=True):
        swapped = ": its sides are swapped" if tuple(size) == table.size(row) else ""
        image = list(table.size(row)[::-1])
        text = f"segmentation: the RLE's size is {size}, the image's is {image}{swapped}"
        table.drop(RLE_SIZE, [row], lambda _, text=text: text)  # type: ignore[misc]
    counts = [table.columns.rles[index] for index in table.rle_index[rows[~differs]].tolist()]
    for row, size, count in zip(rows[~differs].tolist(), given[~differs].tolist(), counts, strict=True):
        rle = {"size": size, "counts": count}
        table.shoelace[row] = coco_mask.area(rle)
        x, y, width, height = coco_mask.toBbox(rle).tolist()
        table.extents[row] = x, y, x + width, y + height
    table.drop(
        DEGENERATE,
        rows[~differs][table.shoelace[rows[~differs]] == 0],
        lambda _: "segmentation: the RLE has no pixel; the annotation is left out",
    )


def _normalize_rles(table: AnnotationTable, sizes: IntArray) -> None:
    """Drop RLEs that are corrupt, and compress those again that are not as pycocotools writes them.

    Args:
        table: the annotations.
        sizes: (N, 2) height and width of each RLE, in px.
    """
    rows = np.nonzero(table.kept & (table.form == RLE))[0]
    rles, index = table.columns.rles, table.rle_index[rows]
    canonical = are_canonical([rles[i] for i in index.tolist()], sizes[index].prod(axis=1))
    for row, i in zip(rows[~canonical].tolist(), index[~canonical].tolist(), strict=True):
        try:
            segmentation = read_segmentation({"size": sizes[i].tolist(), "counts": rles[i].decode()})
        except BadEntry as error:
            text = str(error)
            table.drop(error.kind, [row], lambda _, text=text: text)  # type: ignore[misc]
            continue
        assert segmentation.rle is not None
        rles[i] = segmentation.rle["counts"]
        for spelling in segmentation.spellings:
            table.report(spelling, row, SPELLINGS[spelling])


def drop_masks_outside(table: AnnotationTable) -> None:
    """Warn about masks that reach beyond the border, and drop those that are almost entirely outside."""
    sizes = table.sizes()
    beyond = distance_beyond(table.extents, sizes)
    rows = np.nonzero(table.kept & (table.form == POLYGONS) & (beyond > 0))[0]
    for row in rows.tolist():
        width, height = table.size(row)
        x1, y1, x2, y2 = table.extents[row]
        inside = (min(x2, width) - max(x1, 0)) * (min(y2, height) - max(y1, 0))
        # Count pixels only if the extents do not decide; counting is slow.
        if min(x2, width) <= max(x1, 0) or min(y2, height) <= max(y1, 0):
            share = 0.0
        elif inside >= 0.5 * (x2 - x1) * (y2 - y1) and beyond[row] <= BORDER_TOLERANCE:
            continue
        else:
            pixels = count_pixels(table.polygons(row), height, width)
            share = pixels / max(table.shoelace[row], 1e-300)
        if share < _MIN_SHARE_INSIDE:
            table.report(
                OUTSIDE, row, _outside_text(table, row, table.extents[row][:2], table.extents[row][2:])
            )
            table.kept[row] = False
        elif beyond[row] > BORDER_TOLERANCE:
            table.report(
                CLIPPED_MASK,
                row,
                f"segmentation: reaches {beyond[row]:.1f} px beyond the border, and is clipped there",
            )
