"""Repair of segmentations that cannot be read, or are written in another form than COCO's."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from maskloss.data.findings import Finding, Kind, shown
from maskloss.data.reading import entries
from maskloss.data.reading import segmentations as checks
from maskloss.data.reading.entries import BadEntry, box_of_mask, read_box, read_segmentation
from maskloss.data.repair.draft import Draft, Fix
from maskloss.data.repair.text import with_numbers
from maskloss.masks.coco_format import decode_rle
from maskloss.masks.encoded import decode_counts

#: Largest difference between the x, y, width and height of a corrected RLE's extent and those of its box, in px.
_BOX_TOLERANCE = 2.0


def _rewrite(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Rewrite a segmentation in COCO's form."""
    item = draft.entry(kind, finding)
    segmentation = read_segmentation(item["segmentation"])
    if not segmentation.spellings:
        return  # already rewritten for another finding of the same annotation
    if segmentation.rle is not None:
        item["segmentation"] = _json_rle(segmentation.rle)
    else:
        # Placeholders for polygons of fewer than three points, which have their own finding in the next round.
        item["segmentation"] = segmentation.polygons + [[0, 0, 0, 0]] * segmentation.degenerate
    draft.record(kind, finding, "segmentation rewritten in COCO's form")


def _salvage_polygons(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Keep the readable polygons, converting numbers written as text, or only the box if there are none."""
    if draft.is_left_out("annotation", finding.position) or _convert_text(draft, kind, finding):
        return
    item = draft.entry(kind, finding)
    given = with_numbers(item["segmentation"])
    polygons = []
    for part in given if isinstance(given, list) else []:
        with contextlib.suppress(BadEntry):
            polygons += read_segmentation([part]).polygons if isinstance(part, list) else []
    if not polygons:
        _keep_box(draft, kind, finding)
        return
    item["segmentation"] = polygons
    draft.record(kind, finding, "kept without the polygons that cannot be read")


def _leave_mask_out(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Convert the text in a segmentation if it then can be read, and keep only the box otherwise."""
    if not draft.is_left_out("annotation", finding.position) and not _convert_text(draft, kind, finding):
        _keep_box(draft, kind, finding)


def _keep_box(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Remove the segmentation of an annotation with a box, and leave out one without."""
    item = draft.entry(kind, finding)
    box = read_box(with_numbers(item.get("bbox"), 4))
    if box is None:
        draft.leave_out(kind, finding)
        return
    if read_box(item["bbox"]) is None:
        item["bbox"] = list(box)
    item["segmentation"] = []
    draft.record(kind, finding, "kept with its box and no mask")


def _convert_text(draft: Draft, kind: Kind, finding: Finding) -> bool:
    """Convert the text in a segmentation to what it spells, and return whether the segmentation then can be read."""
    item = draft.entry(kind, finding)
    given = item["segmentation"]
    converted = with_numbers(given)
    try:
        segmentation = read_segmentation(converted)
    except BadEntry:
        return False
    if segmentation.empty or shown(converted, 10**9) == shown(given, 10**9):
        return False
    if _may_be_runs(given) and not _overlaps(box_of_mask(segmentation), item.get("bbox")):
        return False
    item["segmentation"] = converted
    was_text = isinstance(given, str)
    change = "segmentation written as a list, not as text" if was_text else "coordinates written as numbers"
    draft.record(kind, finding, change)
    return True


def _may_be_runs(text: Any) -> bool:
    """Return whether text may be starts and lengths of runs, as in Kaggle's RLEs, instead of coordinates."""
    return isinstance(text, str) and re.fullmatch(r"[0-9\s]+", text) is not None


def _overlaps(box: list[float], other: Any) -> bool:
    """Return whether a box covers a tenth of a bbox, or the bbox cannot be read."""
    given = read_box(with_numbers(other, 4))
    if given is None:
        return True
    x, y, width, height = given
    across = min(box[0] + box[2], x + width) - max(box[0], x)
    down = min(box[1] + box[3], y + height) - max(box[1], y)
    return min(across, down) > 0 and across * down >= 0.1 * width * height


def _correct_rle_size(draft: Draft, kind: Kind, finding: Finding) -> None:
    """Correct an RLE whose size is swapped: transpose its mask or swap only the size, whichever fits its box."""
    item = draft.entry(kind, finding)
    size, box = draft.size_of_image(item), read_box(item.get("bbox"))
    if size is None or _convert_text(draft, kind, finding):
        return
    width, height = size
    try:
        rle = read_segmentation(item["segmentation"]).rle
    except BadEntry:
        rle = None
    if rle is None or box is None or rle["size"] != [width, height]:
        _leave_mask_out(draft, kind, finding)
        return
    swapped = coco_mask.encode(np.asfortranarray(decode_rle(rle).T))
    renamed = {"size": [height, width], "counts": rle["counts"]}
    fitting = [
        candidate
        for candidate in (swapped, renamed)
        if np.abs(np.array(coco_mask.toBbox(candidate)) - box).max() <= _BOX_TOLERANCE
    ]
    if len(fitting) != 1:
        _leave_mask_out(draft, kind, finding)
        return
    given = item["segmentation"]
    if isinstance(given, dict) and isinstance(given["counts"], list):
        runs = decode_counts(fitting[0]["counts"]).tolist()
        item["segmentation"] = {**given, "size": [height, width], "counts": runs}
    else:
        item["segmentation"] = _json_rle(fitting[0])
    draft.record(kind, finding, "RLE's size and mask corrected to fit the image")


def _json_rle(rle: dict[str, Any]) -> dict[str, Any]:
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


FIXES: dict[Kind, Fix] = {
    entries.FLAT_POLYGON: _rewrite,
    entries.POINT_PAIRS: _rewrite,
    entries.NESTED_POLYGONS: _rewrite,
    entries.RLE_IN_LIST: _rewrite,
    entries.RLE_COUNTS: _rewrite,
    entries.BAD_SEGMENTATION: _salvage_polygons,
    checks.NOT_FINITE: _salvage_polygons,
    entries.CORRUPT_RLE: _leave_mask_out,
    entries.RLE_SIZE: _correct_rle_size,
}
