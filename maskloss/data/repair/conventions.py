"""Repair of conventions that all annotations of a file follow: what a crowd is, units, areas and sides of boxes."""

from __future__ import annotations

import numpy as np

from maskloss.data.findings import Finding, Kind, shown
from maskloss.data.reading.annotations import AREA_OF_BOX, FRACTIONS
from maskloss.data.reading.boxes import BOX_CONVENTION
from maskloss.data.reading.conventions import box_readings
from maskloss.data.reading.entries import BadEntry, read_box, read_crowd, read_segmentation
from maskloss.data.repair.draft import Draft, Fix
from maskloss.data.repair.geometry import FROM_MASKS, clipped_box_of_mask

TO_OBJECTS = Kind("crowds_to_objects", "annotation", True)


def turn_crowds_into_objects(draft: Draft) -> None:
    """Set `iscrowd` to 0 in all annotations."""
    for position, item in draft.entries("annotation"):
        if read_crowd(item.get("iscrowd", 0)) == 1:
            item["iscrowd"] = 0
            name = f"annotation {shown(item.get('id', position))}"
            draft.log.add(TO_OBJECTS, "iscrowd set to 0", name, "a crowd", item)


def take_boxes_from_masks(draft: Draft) -> None:
    """Compute the box of each annotation that has a mask from the mask."""
    for position, item in draft.entries("annotation"):
        if draft.is_left_out("annotation", position):
            continue
        box, old = clipped_box_of_mask(draft, item), read_box(item.get("bbox"))
        if box is None or (old is not None and max(abs(a - b) for a, b in zip(box, old, strict=True)) < 1e-6):
            continue
        item["bbox"] = box
        name = f"annotation {shown(item.get('id', position))}"
        draft.log.add(FROM_MASKS, "box taken from the mask", name, f"bbox {shown(old and list(old))}", item)


def _scale_fractions(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Convert polygons from fractions or percentages of the image to px, and also the boxes if all are such."""
    whole: int = finding.value  # what stands for the image's width or height: 1 or 100
    items = [item for _, item in draft.entries("annotation")]
    boxes = [box for box in (read_box(item.get("bbox")) for item in items) if box is not None]
    boxes_too = all(-0.01 <= value <= 1.01 * whole for box in boxes for value in box)
    for item in items:
        size = draft.size_of_image(item)
        if size is None:
            continue
        try:
            polygons = read_segmentation(item.get("segmentation")).polygons
        except BadEntry:
            continue
        if polygons:
            item["segmentation"] = [
                [v * size[i % 2] / whole for i, v in enumerate(polygon)] for polygon in polygons
            ]
        box = read_box(item.get("bbox"))
        if boxes_too and box is not None:
            item["bbox"] = [value * size[i % 2] / whole for i, value in enumerate(box)]
        name = f"annotation {shown(item.get('id'))}"
        draft.log.add(kind, "fractions or percentages converted to px", name, finding.detail, item)


def _replace_areas(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Replace the areas of boxes by those of the masks."""
    records = draft.data.records
    for position, row in draft.rows.items():
        has_mask_and_area = records.form[row] and not np.isnan(records.areas[row])
        if not has_mask_and_area or draft.is_left_out("annotation", position):
            continue
        item, area = draft.document["annotations"][position], records.mask_area(row)
        if abs(area - item["area"]) > 0.1 * item["area"]:
            item["area"] = area
            name = f"annotation {shown(item.get('id'))}"
            draft.log.add(kind, "area of the box replaced by the mask's", name, "area of the box", item)


def _convert_boxes(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Convert the boxes of annotations without a mask from the convention that the other boxes follow."""
    if not finding.value:
        return
    for position, item in draft.entries("annotation"):
        left_out = draft.is_left_out("annotation", position)
        if left_out or clipped_box_of_mask(draft, item) is not None:
            continue
        size, box = draft.size_of_image(item), read_box(item.get("bbox"))
        if size is None or box is None:
            continue
        reading = box_readings(np.array([box]), np.array([size], dtype=np.float64))[finding.value]
        x1, y1, x2, y2 = (float(side[0]) for side in reading)
        item["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        name = f"annotation {shown(item.get('id', position))}"
        draft.log.add(kind, f"box read as {finding.value}", name, "no mask", item)


FIXES: dict[Kind, Fix] = {
    FRACTIONS: _scale_fractions,
    AREA_OF_BOX: _replace_areas,
}

#: Fixes with the option that takes boxes from masks.
BOX_FIXES: dict[Kind, Fix] = {BOX_CONVENTION: _convert_boxes}
