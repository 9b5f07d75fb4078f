"""Validation of annotations against their images and categories, vectorized over all annotations of a file.

`build_records` decides which annotations are kept, and computes their boxes and areas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from maskloss.data.columns import ABSENT, AREA_GIVEN, AREA_ODD, SPELLINGS, Columns, ImageColumns, integers
from maskloss.data.conventions import (
    BORDER_TOLERANCE,
    distance_beyond,
    look_like_corners,
    look_like_percentages,
    suspected_convention,
    xyxy_of,
)
from maskloss.data.entries import BAD_POINTS, RLE_SIZE, BadEntry, read_segmentation, spelled_number
from maskloss.data.findings import Findings, Kind, shown
from maskloss.data.records import (
    NO_MASK,
    POLYGONS,
    RLE,
    BoolArray,
    Records,
    Texts,
    polygon_extents,
    polygons_of,
)
from maskloss.masks.coco_format import count_pixels
from maskloss.masks.coverage import union_area
from maskloss.masks.encoded import FloatArray, IntArray, are_canonical

#: Largest plausible distance of a polygon from the image, in multiples of the image's longer side.
_MAX_DISTANCE = 10
#: Smallest share of a mask's area inside the image; with less, the object is assumed to belong to another image.
_MIN_SHARE_INSIDE = 0.05
#: Largest usable area, in px². COCO's evaluation has no size class for larger ones and ignores the objects.
_MAX_AREA = 1e10
#: Area in px² up to which a polygon is degenerate.
NO_AREA = 1e-9

_LEFT_OUT = "`maskloss repair` leaves them out"
_FROM_MASKS = "`maskloss repair --boxes from-masks` takes the masks' extents"
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
OUTSIDE = Kind("outside", "annotation", True, "annotations that reach far outside their image", _LEFT_OUT)
CLIPPED_MASK = Kind(
    "clipped_mask",
    "annotation",
    False,
    "segmentations that reach beyond the image's border are clipped there",
)
NO_BOX = Kind("no_box", "annotation", True, "annotations with neither a box nor a segmentation", _LEFT_OUT)
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
BOX_OUTSIDE = Kind("box_outside", "annotation", True, "boxes that lie outside their image", _LEFT_OUT)
CLIPPED_BOX = Kind(
    "clipped_box", "annotation", False, "boxes that reach beyond the image's border are clipped there"
)
BOX_CONVENTION = Kind("box_convention", "annotation", True, "", _FROM_MASKS)
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


@dataclass
class _Table:
    """The annotation columns as arrays, with the results of the checks for each row; R rows, P polygons."""

    columns: Columns
    positions: IntArray
    ids: IntArray
    image: IntArray  # (R,) index of the image, -1 if it is unknown
    form: Any
    crowds: BoolArray
    kept: BoolArray
    boxes: FloatArray  # (R, 4) x, y, width, height
    part_first: IntArray
    part_count: IntArray
    point_first: IntArray
    point_count: IntArray
    coordinates: FloatArray
    rle_index: IntArray  # (R,) index into the RLEs
    extents: FloatArray  # (R, 4) xyxy of the mask, NaN without a mask
    shoelace: FloatArray  # (R,) sum of the polygons' areas, or number of pixels of the RLE
    images: ImageColumns
    findings: Findings

    def name(self, row: int) -> str:
        has_id = self.columns.has_id[row]
        return f"annotation {self.ids[row]}" if has_id else f"annotation number {self.positions[row]}"

    def image_text(self, row: int) -> str:
        index = self.image[row]
        return f" (image {self.images.ids[index]}, {shown(self.images.names[index]).strip(chr(39))})"

    def size(self, row: int) -> tuple[int, int]:
        return self.images.widths[self.image[row]], self.images.heights[self.image[row]]

    def report(self, kind: Kind, row: int, text: str) -> None:
        self.findings.add(kind, int(self.positions[row]), self.name(row), text + self.image_text(row))

    def drop(self, kind: Kind, rows: Iterable[Any], text: Callable[[int], str]) -> None:
        for row in rows:
            self.report(kind, int(row), text(int(row)))
            self.kept[row] = False

    def polygons(self, row: int) -> list[FloatArray]:
        parts = slice(self.part_first[row], self.part_first[row] + self.part_count[row])
        return polygons_of(self.coordinates, self.point_first[parts], self.point_count[parts])


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
    table = _make_table(columns, images, findings)
    _match_images(table, faulty_ids=images.faulty)
    _match_categories(table, categories, faulty_categories)
    _measure_polygons(table)
    _measure_rles(table)
    _check_sizes(table, different_sizes)
    _report_faults(table)
    _check_fractions(table)
    _check_masks_inside(table)
    boxes = _check_boxes(table)
    areas = _check_areas(table)
    _assign_new_ids(table)
    _report_weights(table)
    _report_crowds(table)
    _check_points(table)
    rows = np.nonzero(table.kept)[0]
    without = rows[(table.form[rows] == NO_MASK) & ~table.crowds[rows]]
    without = without[[row not in columns.points for row in without.tolist()]]
    if len(without) and len(without) == (~table.crowds[rows]).sum():
        text = f"none of the {len(without)} objects has a mask: only the boxes are trained, unless the loss is `weak`"
        table.findings.add(BOX_ONLY, -1, "", text)
        without = without[:0]
    for row in without:
        table.report(BOX_ONLY, int(row), "has a box and no mask")
    rows = rows[np.argsort(table.image[rows], kind="stable")]
    counts = np.bincount(table.image[rows], minlength=len(images.ids))
    is_rle = table.form[rows] == RLE
    records = Records(
        **images.arrays(),
        first=np.concatenate([[0], counts.cumsum()]).astype(np.int64),
        ids=table.ids[rows],
        category_ids=_with_large_ids(columns.category_ids, columns.odd_category_ids)[rows],
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


def _make_table(columns: Columns, images: ImageColumns, findings: Findings) -> _Table:
    rows = len(columns)
    form = np.array(columns.forms, dtype=np.uint8)
    point_count = np.array(columns.point_counts, dtype=np.int64)
    parts = np.where(form == POLYGONS, np.array(columns.part_counts, dtype=np.int64), 0)
    is_rle = form == RLE
    return _Table(
        columns=columns,
        positions=np.array(columns.positions, dtype=np.int64),
        ids=_with_large_ids(columns.ids, columns.odd_ids),
        image=np.full(rows, -1),
        form=form,
        crowds=np.array(columns.crowds, dtype=bool),
        kept=np.ones(rows, dtype=bool),
        boxes=np.array(columns.boxes, dtype=np.float64).reshape(-1, 4),
        part_first=parts.cumsum() - parts,
        part_count=parts + is_rle,
        point_first=point_count.cumsum() - point_count,
        point_count=point_count,
        coordinates=np.frombuffer(columns.coordinates, dtype=np.float64)
        if columns.coordinates
        else np.empty(0),
        rle_index=is_rle.cumsum() - is_rle,
        extents=np.full((rows, 4), np.nan),
        shoelace=np.full(rows, np.nan),
        images=images,
        findings=findings,
    )


def _with_large_ids(column: Any, odd: dict[int, Any]) -> IntArray:
    """Return a column of ids as an array, including the ids of more than 64 bits from `odd`."""
    large = {row: value for row, value in odd.items() if type(value) is int}
    if not large:
        return np.array(column, dtype=np.int64)
    ids = np.array(column, dtype=object)
    for row, value in large.items():
        ids[row] = value
    return ids


def _match_images(table: _Table, faulty_ids: set[Any]) -> None:
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


def _match_categories(table: _Table, categories: set[int], faulty: set[Any] | None) -> None:
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


def _measure_polygons(table: _Table) -> None:
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
    limit = (_MAX_DISTANCE + 1) * _sizes(table).max(axis=1)[owner]
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


def _outside_text(table: _Table, row: int, low: Any, high: Any) -> str:
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


def _measure_rles(table: _Table) -> None:
    """Compute the extents and areas of RLEs, and drop those that are corrupt or have another size than their image."""
    sizes = np.array(table.columns.rle_sizes, dtype=np.int64).reshape(-1, 2)
    _check_rles(table, sizes)
    rows = np.nonzero(table.kept & (table.form == RLE))[0]
    given = sizes[table.rle_index[rows]]
    differs = (given[:, ::-1] != _sizes(table)[rows]).any(axis=1)
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


def _check_rles(table: _Table, sizes: IntArray) -> None:
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


def _sizes(table: _Table) -> FloatArray:
    """Return the width and height of each row's image, (R, 2)."""
    sides = np.array([table.images.widths, table.images.heights], dtype=np.float64).reshape(2, -1)
    if not sides.shape[1]:
        return np.ones((len(table.kept), 2))
    return sides[:, np.maximum(table.image, 0)].T


def _check_sizes(table: _Table, different_sizes: Callable[[Iterable[int]], set[int]]) -> None:
    """Report and remove images whose size differs from the recorded one, a likely cause of annotations outside them."""
    sizes = _sizes(table)
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


def _report_faults(table: _Table) -> None:
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


def _check_points(table: _Table) -> None:
    for row, points in table.columns.points.items():
        if not table.kept[row]:
            continue
        width, height = table.size(row)
        for x, y, label in points:
            if label >= 0 and not (0 <= x <= width and 0 <= y <= height):
                text = f"point_coords: [{x:g}, {y:g}] is outside the image of {width} x {height} (width x height)"
                table.report(BAD_POINTS, row, text)
                break


def _check_fractions(table: _Table) -> None:
    """Report and drop polygons or boxes if all their coordinates are fractions or percentages of the image, not px."""
    rows, numbers, what = table.kept & (table.form == POLYGONS), table.extents, "polygons"
    if not rows.any():
        rows, numbers, what = table.kept & (table.form == NO_MASK), table.boxes, "boxes"
    if not rows.any():
        return
    low, high = numbers[rows].min(), numbers[rows].max()
    if not (low >= -0.01 and high <= 101):  # also if one of them is NaN
        return
    count = int(rows.sum())
    if high <= 1.01 and _sizes(table)[rows].min() >= 8:
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
        (numbers if what == "polygons" else xyxy_of(numbers))[rows], table.image[rows], _sizes(table)[rows]
    ):
        text = (
            f"the {what} look like percentages of the image instead of px: all {count} lie between 0 and 100"
        )
        table.findings.add(FRACTIONS, -1, "", text, 100)
        table.kept &= ~rows


def _check_masks_inside(table: _Table) -> None:
    """Warn about masks that reach beyond the border, and drop those that are almost entirely outside."""
    sizes = _sizes(table)
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


def _check_boxes(table: _Table) -> FloatArray:
    """Return the boxes as xyxy inside the images, and drop rows without a usable box."""
    sizes = _sizes(table)
    boxes = table.boxes
    has_mask = table.form != NO_MASK
    corners = xyxy_of(boxes)
    readable = (np.abs(corners) < 1e9).all(axis=1)
    extents = np.concatenate(
        [np.maximum(table.extents[:, :2], 0), np.minimum(table.extents[:, 2:], sizes)], axis=1
    )

    def box_text(row: int) -> str:
        value = (
            table.columns.odd_boxes[row]
            if row in table.columns.odd_boxes
            else [_short(v) for v in boxes[row]]
        )
        return shown(value)

    for row in np.nonzero(table.kept & ~readable & has_mask)[0].tolist():
        table.report(BOX_FROM_MASK, row, f"bbox {box_text(row)} is taken from the mask")
    table.drop(
        NO_BOX,
        np.nonzero(table.kept & ~readable & ~has_mask)[0],
        lambda row: f"bbox must be four finite numbers x, y, width, height, not {box_text(row)}",
    )
    flat = (boxes[:, 2] <= 0) | (boxes[:, 3] <= 0)
    comparable = table.kept & readable & has_mask & ~table.crowds & ~flat
    convention = suspected_convention(boxes[comparable], table.extents[comparable], sizes[comparable])
    without = table.kept & readable & ~has_mask & ~flat
    if not comparable.any() and look_like_corners(boxes[without], sizes[without]):
        text = (
            "the boxes look like x1, y1, x2, y2 instead of x, y, width, height: otherwise most reach beyond their "
            "images"
        )
        table.findings.add(BOX_CONVENTION, -1, "", text, "x1, y1, x2, y2")
        table.kept &= ~without
    elif convention is not None:
        name, fitting = convention
        text = (
            f"the boxes look like {name} instead of x, y, width, height: read so, {fitting} of {int(comparable.sum())} "
            "fit their masks"
            if name
            else f"{fitting} of {int(comparable.sum())} boxes are nowhere near their masks"
        )
        table.findings.add(BOX_CONVENTION, -1, "", text, name)
    num_flat = int((table.kept & readable & has_mask & ~table.crowds & flat).sum())
    # Some scripts write 0, 0, 0, 0 everywhere. A few flat boxes are left out.
    if convention is None and num_flat > 1 and num_flat >= 4 * comparable.sum():
        convention = "", 0
        text = f"{num_flat} of {num_flat + int(comparable.sum())} boxes have no area, but their masks do"
        table.findings.add(BOX_CONVENTION, -1, "", text, "")
    if convention is not None:
        # Boxes without a mask are assumed to follow the same convention as those with one.
        table.kept &= has_mask
    from_mask = table.kept & has_mask & (~readable | (convention is not None))
    corners[from_mask] = extents[from_mask]
    checked = table.kept & ~from_mask
    table.drop(
        FLAT_BOX,
        np.nonzero(checked & flat)[0],
        lambda row: f"bbox has a side that is zero or negative: {box_text(row)}; the annotation is left out",
    )
    beyond = distance_beyond(corners, sizes)
    clipped = np.concatenate([np.clip(corners[:, :2], 0, None), np.minimum(corners[:, 2:], sizes)], axis=1)
    nothing = (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)
    # Targets are float32.
    single = clipped.astype(np.float32)
    thin = (single[:, 2:] <= single[:, :2]).any(axis=1)
    table.drop(
        BOX_OUTSIDE,
        np.nonzero(checked & table.kept & nothing)[0],
        lambda row: (
            f"bbox {box_text(row)} lies outside the image of {table.size(row)[0]} x {table.size(row)[1]} "
            "(width x height)"
        ),
    )
    table.drop(
        FLAT_BOX,
        np.nonzero(table.kept & thin)[0],
        lambda row: f"bbox {box_text(row)} has a side that is 0 in float32; the annotation is left out",
    )
    reaching = np.nonzero(checked & table.kept & (beyond > BORDER_TOLERANCE))[0]
    for row in reaching.tolist():
        table.report(
            CLIPPED_BOX,
            row,
            f"bbox {box_text(row)} reaches {beyond[row]:.1f} px beyond the border, and is clipped there",
        )
    return clipped


def _short(value: Any) -> int | float:
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else float(value)


def _check_areas(table: _Table) -> FloatArray:
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


def _assign_new_ids(table: _Table) -> None:
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


def _report_weights(table: _Table) -> None:
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


def _report_crowds(table: _Table) -> None:
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
