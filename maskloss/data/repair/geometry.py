"""Repair of masks, boxes and areas that do not fit the image or each other."""

from __future__ import annotations

from typing import Any

import numpy as np

from maskloss.data.findings import Finding, Kind
from maskloss.data.reading.annotations import ODD_AREA
from maskloss.data.reading.boxes import BOX_FROM_MASK, BOX_OUTSIDE, CLIPPED_BOX, FLAT_BOX, NO_BOX
from maskloss.data.reading.entries import BadEntry, box_of_mask, read_box, read_segmentation
from maskloss.data.reading.segmentations import DEGENERATE, DEGENERATE_PART, NO_AREA, OUTSIDE
from maskloss.data.repair.draft import Draft, Fix
from maskloss.data.repair.text import with_numbers
from maskloss.masks.coverage import union_area

FROM_MASKS = Kind("boxes_from_masks", "annotation", True)


def clipped_box_of_mask(draft: Draft, annotation: dict[str, Any]) -> list[float] | None:
    """Return the box [x, y, width, height] of an annotation's mask, clipped to the image, or None without one."""
    size = draft.size_of_image(annotation)
    try:
        segmentation = read_segmentation(annotation.get("segmentation"))
    except BadEntry:
        return None
    if size is None or (segmentation.rle is None and not segmentation.polygons):
        return None
    x, y, width, height = box_of_mask(segmentation)
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + width, size[0]), min(y + height, size[1])
    return [x1, y1, x2 - x1, y2 - y1] if x2 > x1 and y2 > y1 else None


def _drop_degenerate(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Leave out the polygons that have no area."""
    item = draft.entry(kind, finding)
    item["segmentation"] = [
        polygon
        for polygon in read_segmentation(item["segmentation"]).polygons
        if union_area([np.array(polygon, dtype=np.float64).reshape(-1, 2)]) > NO_AREA
    ]
    draft.record(kind, finding, "degenerate polygons left out")


def _convert_text(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Write a box of text as numbers, and leave out an annotation whose box cannot be read."""
    item = draft.entry(kind, finding)
    box = read_box(with_numbers(item.get("bbox"), 4))
    # A box that can be read is one of numbers that are too large.
    if box is None or read_box(item["bbox"]) is not None:
        draft.leave_out(kind, finding)
        return
    item["bbox"] = list(box)
    draft.record(kind, finding, "box written as numbers")


def _leave_out_or_take_box(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Leave out an annotation whose box is empty or outside, unless boxes are to be taken from the masks."""
    item = draft.entry(kind, finding)
    box = clipped_box_of_mask(draft, item) if draft.boxes_from_masks else None
    if box is None:
        draft.leave_out(kind, finding)
    elif not draft.is_left_out("annotation", finding.position):
        item["bbox"] = box
        draft.record(FROM_MASKS, finding, "box taken from the mask")


def _write_box(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Write the box that `read_coco` takes from the mask or clips, unless the file's box is one of text."""
    if finding.position not in draft.rows:
        return  # the annotation has an error too; the finding comes back in the round after its repair
    item = draft.entry(kind, finding)
    given = item.get("bbox")
    if read_box(given) is None and read_box(with_numbers(given, 4)) is not None:
        _convert_text(draft, kind, finding)
        return
    x1, y1, x2, y2 = draft.data.records.boxes[draft.rows[finding.position]].tolist()
    item["bbox"] = [x1, y1, x2 - x1, y2 - y1]
    from_mask = kind is BOX_FROM_MASK
    draft.record(kind, finding, "box taken from the mask" if from_mask else "box clipped at the border")


def _write_area(draft: Draft, kind: Kind, finding: Finding) -> None:
    if finding.position in draft.rows:
        draft.entry(kind, finding)["area"] = draft.data.records.area(draft.rows[finding.position])
        draft.record(kind, finding, "area computed from the mask or the box")


FIXES: dict[Kind, Fix] = {
    DEGENERATE: Draft.leave_out,
    DEGENERATE_PART: _drop_degenerate,
    OUTSIDE: Draft.leave_out,
    NO_BOX: _convert_text,
    FLAT_BOX: _leave_out_or_take_box,
    BOX_OUTSIDE: _leave_out_or_take_box,
    BOX_FROM_MASK: _write_box,
    CLIPPED_BOX: _write_box,
    ODD_AREA: _write_area,
}
