"""Validation of the boxes of an annotation file, compared with its masks and images."""

from __future__ import annotations

import numpy as np

from maskloss.data.findings import LEFT_OUT, Kind, shown
from maskloss.data.reading.annotation_table import AnnotationTable
from maskloss.data.reading.conventions import (
    BORDER_TOLERANCE,
    distance_beyond,
    look_like_corners,
    suspected_convention,
    xyxy_of,
)
from maskloss.data.records import NO_MASK, BoolArray
from maskloss.masks.encoded import FloatArray

_FROM_MASKS = "`maskloss repair --boxes from-masks` takes the masks' extents"
NO_BOX = Kind("no_box", "annotation", True, "annotations with neither a box nor a segmentation", LEFT_OUT)
BOX_FROM_MASK = Kind(
    "box_from_mask",
    "annotation",
    False,
    "boxes that are missing or not four numbers are taken from the masks",
)
FLAT_BOX = Kind(
    "flat_box",
    "annotation",
    False,
    "annotations with a box of no area are left out",
    "`maskloss repair --boxes from-masks` keeps those that have a mask",
)
BOX_OUTSIDE = Kind("box_outside", "annotation", True, "boxes that lie outside their image", LEFT_OUT)
CLIPPED_BOX = Kind(
    "clipped_box", "annotation", False, "boxes that reach beyond the image's border are clipped there"
)
BOX_CONVENTION = Kind("box_convention", "annotation", True, "", _FROM_MASKS)


def read_boxes(table: AnnotationTable) -> FloatArray:
    """Return the boxes as xyxy inside the images, (R, 4), and drop annotations without a usable box."""
    has_mask = table.form != NO_MASK
    readable = _report_unreadable(table)
    others = _report_convention(table, readable)
    if others:
        # Boxes without a mask are assumed to follow the same convention as those with one.
        table.kept &= has_mask
    from_mask = table.kept & has_mask & (~readable | others)
    corners = np.where(from_mask[:, None], _inside(table.extents, table.sizes()), xyxy_of(table.boxes))
    return _clip(table, corners, table.kept & ~from_mask)


def _inside(corners: FloatArray, sizes: FloatArray) -> FloatArray:
    """Return the parts of xyxy boxes inside the images."""
    return np.concatenate([np.maximum(corners[:, :2], 0), np.minimum(corners[:, 2:], sizes)], axis=1)


def _box_text(table: AnnotationTable, row: int) -> str:
    """Return a box as in the file."""
    numbers = [
        int(value) if value.is_integer() and abs(value) < 1e15 else value
        for value in table.boxes[row].tolist()
    ]
    return shown(table.columns.odd_boxes.get(row, numbers))


def _report_unreadable(table: AnnotationTable) -> BoolArray:
    """Return which boxes are four finite numbers, (R,); report the others, and drop those without a mask."""
    has_mask = table.form != NO_MASK
    readable = np.asarray((np.abs(xyxy_of(table.boxes)) < 1e9).all(axis=1))
    for row in np.nonzero(table.kept & ~readable & has_mask)[0].tolist():
        table.report(BOX_FROM_MASK, row, f"bbox {_box_text(table, row)} is taken from the mask")
    table.drop(
        NO_BOX,
        np.nonzero(table.kept & ~readable & ~has_mask)[0],
        lambda row: f"bbox must be four finite numbers x, y, width, height, not {_box_text(table, row)}",
    )
    return readable


def _report_convention(table: AnnotationTable, readable: BoolArray) -> bool:
    """Report boxes that are not x, y, width, height throughout, and return whether they contradict their masks."""
    sizes, boxes = table.sizes(), table.boxes
    has_mask = table.form != NO_MASK
    flat = (boxes[:, 2:] <= 0).any(axis=1)
    with_mask = table.kept & readable & has_mask & ~table.crowds
    comparable = with_mask & ~flat
    count, num_flat = int(comparable.sum()), int((with_mask & flat).sum())
    without = table.kept & readable & ~has_mask & ~flat
    if not count and look_like_corners(boxes[without], sizes[without]):
        text = (
            "the boxes look like x1, y1, x2, y2 instead of x, y, width, height: otherwise most reach beyond their "
            "images"
        )
        table.findings.add(BOX_CONVENTION, -1, "", text, "x1, y1, x2, y2")
        table.kept &= ~without
    convention = suspected_convention(boxes[comparable], table.extents[comparable], sizes[comparable])
    if convention is not None:
        name, fitting = convention
        text = f"{fitting} of {count} boxes are nowhere near their masks"
        if name:
            text = (
                f"the boxes look like {name} instead of x, y, width, height: read so, {fitting} of {count} fit their "
                "masks"
            )
        table.findings.add(BOX_CONVENTION, -1, "", text, name)
        return True
    # Some scripts write 0, 0, 0, 0 everywhere. A few flat boxes are left out.
    if num_flat > 1 and num_flat >= 4 * count:
        text = f"{num_flat} of {num_flat + count} boxes have no area, but their masks do"
        table.findings.add(BOX_CONVENTION, -1, "", text, "")
        return True
    return False


def _clip(table: AnnotationTable, corners: FloatArray, of_file: BoolArray) -> FloatArray:
    """Return xyxy boxes clipped to the images, (R, 4), and drop those of which nothing is left.

    Args:
        table: the annotations.
        corners: (R, 4) the boxes.
        of_file: (R,) bool, which of them are the file's, and not the extent of the mask.
    """
    sizes = table.sizes()
    table.drop(
        FLAT_BOX,
        np.nonzero(of_file & (table.boxes[:, 2:] <= 0).any(axis=1))[0],
        lambda row: (
            f"bbox has a side that is zero or negative: {_box_text(table, row)}; the annotation is left out"
        ),
    )
    clipped = _inside(corners, sizes)
    nothing = (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)
    table.drop(
        BOX_OUTSIDE,
        np.nonzero(of_file & table.kept & nothing)[0],
        lambda row: (
            f"bbox {_box_text(table, row)} lies outside the image of {table.size(row)[0]} x {table.size(row)[1]} "
            "(width x height)"
        ),
    )
    # Targets are float32.
    single = clipped.astype(np.float32)
    table.drop(
        FLAT_BOX,
        np.nonzero(table.kept & (single[:, 2:] <= single[:, :2]).any(axis=1))[0],
        lambda row: (
            f"bbox {_box_text(table, row)} has a side that is 0 in float32; the annotation is left out"
        ),
    )
    beyond = distance_beyond(corners, sizes)
    for row in np.nonzero(of_file & table.kept & (beyond > BORDER_TOLERANCE))[0].tolist():
        text = f"bbox {_box_text(table, row)} reaches {beyond[row]:.1f} px beyond the border, and is clipped there"
        table.report(CLIPPED_BOX, row, text)
    return clipped
