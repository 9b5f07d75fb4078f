"""Validation of annotations against their images and categories, vectorized over all annotations of a file.

`build_records` decides which annotations are kept, and computes their boxes and areas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from maskloss.data.findings import Findings, Kind, shown
from maskloss.data.reading.annotation_table import AnnotationTable, with_large_ids
from maskloss.data.reading.boxes import read_boxes
from maskloss.data.reading.columns import ABSENT, AREA_GIVEN, AREA_ODD, Columns, ImageColumns, integers
from maskloss.data.reading.conventions import (
    BORDER_TOLERANCE,
    distance_beyond,
    look_like_percentages,
    xyxy_of,
)
from maskloss.data.reading.entries import BAD_POINTS, RLE_SIZE, spelled_number
from maskloss.data.reading.segmentations import OUTSIDE, drop_masks_outside, measure_polygons, measure_rles
from maskloss.data.records import (
    NO_MASK,
    POLYGONS,
    RLE,
    Records,
    Texts,
)
from maskloss.masks.encoded import FloatArray, IntArray

#: Largest usable area, in px². COCO's evaluation has no size class for larger ones and ignores the objects.
_MAX_AREA = 1e10

DOUBLED_ID = Kind("doubled_id", "annotation", False, "annotations with a duplicate id get a new id")
UNKNOWN_IMAGE = Kind(
    "unknown_image",
    "annotation",
    True,
    "annotations of images that are not in the file",
    "`maskloss repair` converts text that spells an id or is a file_name, and leaves out the others",
)
UNKNOWN_CATEGORY = Kind(
    "unknown_category",
    "annotation",
    True,
    "annotations of categories that are not in the file",
    "`maskloss repair` converts text that spells an id or a name, and leaves out the others",
)
FRACTIONS = Kind("fractions", "annotation", True, "", "`maskloss repair` converts them to px")
BITMAPS = Kind(
    "bitmaps",
    "annotation",
    True,
    "",
    "write them as RLEs: `pycocotools.mask.encode(np.asfortranarray(mask))`",
)
BOX_ONLY = Kind("box_only", "annotation", False, "objects have a box and no mask")
ODD_AREA = Kind(
    "odd_area",
    "annotation",
    False,
    "areas that are zero, negative, too large or not a number are replaced by the masks'",
)
AREA_OF_BOX = Kind("area_of_box", "annotation", False)
WEIGHTS = Kind("weights", "annotation", False)
CROWDS = Kind("crowds", "annotation", False)
ALL_CROWDS = Kind("all_crowds", "annotation", True)


# The numbers in a file may be of any size, and NaN stands for missing values.
@np.errstate(invalid="ignore", over="ignore")
def build_records(
    columns: Columns,
    images: ImageColumns,
    categories: set[int],
    faulty_categories: set[Any] | None,
    different_sizes: Callable[[Iterable[int]], set[int]],
    findings: Findings,
) -> tuple[Records, IntArray]:
    """Validate annotations against their images and categories, and build the arrays of both.

    Args:
        columns: the annotations.
        images: the images without errors. Those with another size than recorded are removed.
        categories: ids of the file's categories.
        faulty_categories: ids of categories with errors. Annotations that refer to one are dropped without a finding.
            None drops all annotations of unknown categories without a finding.
        different_sizes: function that takes image indices and returns those of images whose file has another size than
            recorded.
        findings: receives the faults and oddities that are found.

    Returns:
        The images and annotations without errors, and the position of each of these annotations in the file's list.
    """
    table = AnnotationTable.of_columns(columns, images, findings)
    _match_images(table, faulty_ids=images.faulty)
    _match_categories(table, categories, faulty_categories)
    measure_polygons(table)
    measure_rles(table)
    _drop_images_of_other_sizes(table, different_sizes)
    _report_faults(table)
    _report_fractions(table)
    drop_masks_outside(table)
    boxes = read_boxes(table)
    areas = _read_areas(table)
    _assign_new_ids(table)
    _report_weights(table)
    _report_crowds(table)
    _report_points_outside(table)
    _report_missing_masks(table)
    rows = np.nonzero(table.kept)[0]
    rows = rows[np.argsort(table.image[rows], kind="stable")]
    counts = np.bincount(table.image[rows], minlength=len(images.ids))
    is_rle = table.form[rows] == RLE
    records = Records(
        **images.arrays(),
        first=np.concatenate([[0], counts.cumsum()]).astype(np.int64),
        ids=table.ids[rows],
        category_ids=with_large_ids(columns.category_ids, columns.odd_category_ids)[rows],
        boxes=boxes[rows],
        crowds=table.crowds[rows],
        areas=areas[rows],
        form=table.form[rows],
        part_first=np.where(is_rle, table.rle_index[rows], table.part_first[rows]),
        part_count=table.part_count[rows],
        point_first=table.point_first,
        point_count=table.point_count,
        coordinates=table.coordinates,
        rles=Texts.of(columns.rles),
        **_supervision(columns, rows.tolist()),
    )
    return records, table.positions[rows]


def _supervision(columns: Columns, rows: list[int]) -> dict[str, Any]:
    """Return the fields of `Records` for weights and points, which most files do not have."""
    arrays: dict[str, Any] = {}
    if columns.weights:
        arrays["weights"] = np.array([columns.weights.get(row, 1.0) for row in rows])
    if columns.points:
        points = [columns.points.get(row, []) for row in rows]
        arrays["points"] = np.array([point for of_row in points for point in of_row]).reshape(-1, 3)
        arrays["first_point"] = np.cumsum([0, *map(len, points)])
    return arrays


def _match_images(table: AnnotationTable, faulty_ids: set[Any]) -> None:
    known = integers(table.images.ids)
    wanted = np.array(table.columns.image_ids, dtype=known.dtype)
    odd = table.columns.odd_image_ids
    found = np.full(len(wanted), -1)
    if len(known):
        order = np.argsort(known)
        place = np.minimum(np.searchsorted(known[order], wanted), len(known) - 1)
        found = np.where(known[order][place] == wanted, order[place], -1)
    index = {identity: number for number, identity in enumerate(table.images.ids)} if odd else {}
    for row, value in odd.items():
        found[row] = index.get(value, -1) if type(value) is int else -1
    table.image[:] = found
    table.kept &= found >= 0
    for row in np.nonzero(found < 0)[0].tolist():
        value = odd[row] if row in odd else int(wanted[row])
        if value is ABSENT:
            if ABSENT not in faulty_ids:
                table.findings.add(
                    UNKNOWN_IMAGE, int(table.positions[row]), table.name(row), "missing image_id"
                )
            continue
        # If the image has an error, that one is the cause, and is reported alone.
        if ABSENT not in faulty_ids and not _refers_to(value, faulty_ids):
            text = f"image_id {shown(value)} is not in the file"
            table.findings.add(UNKNOWN_IMAGE, int(table.positions[row]), table.name(row), text)


def _refers_to(value: Any, ids: set[Any]) -> bool:
    """Return whether a reference is to one of some ids, as written or as the number that its text spells."""
    return isinstance(value, str | int | float) and (value in ids or spelled_number(value) in ids)


def _match_categories(table: AnnotationTable, categories: set[int], faulty: set[Any] | None) -> None:
    wanted = np.array(table.columns.category_ids, dtype=np.int64)
    good = np.isin(wanted, integers(sorted(categories)))
    for row, value in table.columns.odd_category_ids.items():
        good[row] = type(value) is int and value in categories
    for row in np.nonzero(table.kept & ~good)[0].tolist():
        value = table.columns.odd_category_ids.get(row, int(wanted[row]))
        if value is ABSENT and faulty is not None:
            table.report(UNKNOWN_CATEGORY, row, "missing category_id")
        elif faulty is not None and not _refers_to(value, faulty):
            table.report(UNKNOWN_CATEGORY, row, f"category_id {shown(value)} is not in the file")
    table.kept &= good


def _drop_images_of_other_sizes(
    table: AnnotationTable, different_sizes: Callable[[Iterable[int]], set[int]]
) -> None:
    """Report and remove images whose size differs from the recorded one, a likely cause of annotations outside them."""
    sizes = table.sizes()
    beyond = (distance_beyond(table.extents, sizes) > BORDER_TOLERANCE) | (
        distance_beyond(xyxy_of(table.boxes), sizes) > BORDER_TOLERANCE
    )
    positions = {f.position for f in table.findings.of(OUTSIDE) + table.findings.of(RLE_SIZE)}
    beyond = (beyond & table.kept) | np.isin(table.positions, sorted(positions))
    different = different_sizes(np.unique(table.image[beyond & (table.image >= 0)]).tolist())
    if not different:
        return
    is_dropped = np.isin(table.image, sorted(different))
    table.kept &= ~is_dropped
    dropped = set(table.positions[is_dropped].tolist())
    for kind, findings in list(table.findings.by_kind.items()):
        if kind.section == "annotation":
            left = [finding for finding in findings if finding.position not in dropped]
            table.findings.by_kind[kind] = left
            if not left:
                del table.findings.by_kind[kind]
    # Renumber the rows' images before the images are removed.
    places = np.cumsum([index not in different for index in range(len(table.images.ids))]) - 1
    table.image = np.where(table.image >= 0, places[np.maximum(table.image, 0)], -1)
    table.image[is_dropped] = -1
    table.images.remove(different)


def _report_faults(table: AnnotationTable) -> None:
    """Report the faults that decoding found in single annotations, except for annotations of images with errors."""
    index = {identity: number for number, identity in enumerate(table.images.ids)}
    for fault in table.columns.faults:
        value = fault.image_id
        plain = isinstance(value, str | int | float)
        if plain and value in table.images.faulty:
            continue
        text = fault.detail
        if plain and value in index:
            number = index[value]
            if fault.kind is RLE_SIZE:
                text += f", the image's is {[table.images.heights[number], table.images.widths[number]]}"
            text += f" (image {value}, {shown(table.images.names[number]).strip(chr(39))})"
        table.findings.add(fault.kind, fault.position, fault.name, text)


def _report_points_outside(table: AnnotationTable) -> None:
    for row, points in table.columns.points.items():
        if not table.kept[row]:
            continue
        width, height = table.size(row)
        for x, y, label in points:
            if label >= 0 and not (0 <= x <= width and 0 <= y <= height):
                text = f"point_coords: [{x:g}, {y:g}] is outside the image of {width} x {height} (width x height)"
                table.report(BAD_POINTS, row, text)
                break


def _report_fractions(table: AnnotationTable) -> None:
    """Report and drop polygons or boxes if all their coordinates are fractions or percentages of the image, not px."""
    rows, numbers, what = table.kept & (table.form == POLYGONS), table.extents, "polygons"
    if not rows.any():
        # Boxes of zeros are missing boxes, in any unit.
        rows, numbers, what = (
            table.kept & (table.form == NO_MASK) & table.boxes.any(axis=1),
            table.boxes,
            "boxes",
        )
    if not rows.any():
        return
    low, high = numbers[rows].min(), numbers[rows].max()
    if not (low >= -0.01 and high <= 101):  # also if one of them is NaN
        return
    count = int(rows.sum())
    if high <= 1.01 and table.sizes()[rows].min() >= 8:
        # A polygon of the image's corners has five points at most.
        if what == "polygons" and table.point_count.min() > 10 and np.isin(table.coordinates, (0, 1)).all():
            text = (
                f"the segmentations of {count} annotations are tables of pixels, 0 and 1, instead of polygons"
            )
            table.findings.add(BITMAPS, -1, "", text)
        else:
            text = (
                f"the {what} look like fractions of the image instead of px: all {count} lie between 0 and 1"
            )
            table.findings.add(FRACTIONS, -1, "", text, 1)
        table.kept &= ~rows
    elif look_like_percentages(
        (numbers if what == "polygons" else xyxy_of(numbers))[rows], table.image[rows], table.sizes()[rows]
    ):
        text = (
            f"the {what} look like percentages of the image instead of px: all {count} lie between 0 and 100"
        )
        table.findings.add(FRACTIONS, -1, "", text, 100)
        table.kept &= ~rows


def _read_areas(table: AnnotationTable) -> FloatArray:
    """Return the usable areas, NaN for the others."""
    areas = np.array(table.columns.areas, dtype=np.float64)
    state = np.array(table.columns.area_states, dtype=np.uint8)
    has_mask = table.form != NO_MASK
    usable = (state == AREA_GIVEN) & (areas > 0) & (areas <= _MAX_AREA)
    odd = table.kept & ~usable & ((state == AREA_GIVEN) | (state == AREA_ODD))
    # Annotation tools write 0 if there is no mask.
    odd &= has_mask | (areas != 0)
    for row in np.nonzero(odd)[0].tolist():
        value = table.columns.odd_areas.get(row, float(areas[row]))
        instead = "mask" if has_mask[row] else "box"
        table.report(ODD_AREA, row, f"area {shown(value)} is replaced by the {instead}'s")
    areas[~usable] = np.nan
    box_areas = table.boxes[:, 2] * table.boxes[:, 3]
    telling = (
        table.kept
        & usable
        & has_mask
        & ~table.crowds
        & (np.abs(table.shoelace - box_areas) > 0.1 * box_areas)
    )
    of_box = telling & (np.abs(areas - box_areas) <= 0.01 * box_areas)
    if of_box.sum() and of_box.sum() >= 0.9 * telling.sum():
        table.findings.add(
            AREA_OF_BOX,
            -1,
            "",
            f"area is that of the box, not of the mask, in {int(of_box.sum())} of {int(telling.sum())} annotations "
            "where the two differ; AP for small, medium and large objects depends on it",
        )
    return areas


def _assign_new_ids(table: AnnotationTable) -> None:
    """Assign new ids to annotations with no id or a duplicate one; no other entry refers to annotation ids."""
    has_id = np.array(table.columns.has_id, dtype=bool)
    with_id = np.nonzero(has_id)[0]
    _, first = np.unique(table.ids[with_id], return_index=True)
    doubled = np.setdiff1d(with_id, with_id[first])
    for row in doubled[table.kept[doubled]].tolist():
        table.report(DOUBLED_ID, row, "the id is used twice; this one is given a new id")
    renumbered = np.union1d(doubled, np.nonzero(~has_id)[0])
    highest = int(table.ids[with_id].max()) if len(with_id) else 0
    start = highest + 1 if 0 <= highest < 2**53 else (-(2**62))
    table.ids[renumbered] = np.arange(start, start + len(renumbered))


def _report_weights(table: AnnotationTable) -> None:
    """Warn of weights, because a file of other origin may mean something else by them, such as kilograms."""
    objects = table.kept & ~table.crowds
    weights = [weight for row, weight in table.columns.weights.items() if objects[row] and weight != 1]
    if weights:
        have = "has a weight" if len(weights) == 1 else "have weights"
        text = (
            f"{len(weights)} of {int(objects.sum())} objects {have} other than 1, from {min(weights):g} to "
            f"{max(weights):g}: the field `weight` multiplies an object's losses; rename it if it means something else"
        )
        table.findings.add(WEIGHTS, -1, "", text)


def _report_crowds(table: AnnotationTable) -> None:
    crowds, total = int((table.kept & table.crowds).sum()), int(table.kept.sum())
    if not crowds:
        return
    text = (
        "crowds are never positives, and are ignored in evaluation; some annotation tools write brush masks as crowds: "
        "if each is one object, `maskloss repair --crowds objects` makes them objects"
    )
    if table.crowds.all():
        table.findings.add(ALL_CROWDS, -1, "", f"all {total} annotations are crowds (iscrowd 1): {text}")
    else:
        are = "is a crowd" if crowds == 1 else "are crowds"
        table.findings.add(CROWDS, -1, "", f"{crowds} of {total} annotations {are} (iscrowd 1): {text}")


def _report_missing_masks(table: AnnotationTable) -> None:
    """Warn about objects that have neither a mask nor labeled points."""
    objects = table.kept & ~table.crowds
    without = objects & (table.form == NO_MASK)
    without[list(table.columns.points)] = False
    count = int(without.sum())
    if count and count == objects.sum():
        text = (
            f"none of the {count} objects has a mask: only the boxes are trained, unless the loss is `weak`"
        )
        table.findings.add(BOX_ONLY, -1, "", text)
        return
    for row in np.nonzero(without)[0].tolist():
        table.report(BOX_ONLY, row, "has a box and no mask")
