"""Images and annotations of a file in columns.

Annotations are added one by one while the file is decoded, before its images are known.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maskloss.data.findings import Kind, shown
from maskloss.data.reading.entries import (
    FLAT_POLYGON,
    LARGEST_RLE,
    NESTED_POLYGONS,
    POINT_PAIRS,
    RLE_COUNTS,
    RLE_IN_LIST,
    BadEntry,
    Segmentation,
    is_absent,
    is_number,
    read_box,
    read_crowd,
    read_points,
    read_segmentation,
    read_weight,
    whole_number,
)
from maskloss.data.records import NO_MASK, POLYGONS, RLE, Texts
from maskloss.masks.encoded import IntArray

FLOAT_ID = Kind(
    "float_id", "annotation", False, "ids that are whole floats, such as 1.0, are read as integers"
)
MISSING_ID = Kind("missing_id", "annotation", False, "annotations without an id get a new one")
TEXT_ID = Kind("text_id", "annotation", True, "ids that are not integers", "`maskloss repair` numbers them")
NO_OBJECT = Kind(
    "not_an_object",
    "annotation",
    True,
    "annotations that are not JSON objects",
    "`maskloss repair` leaves them out",
)
ODD_CROWD = Kind(
    "odd_iscrowd", "annotation", False, "values of iscrowd that are null or text are read as 0 or 1"
)
BAD_CROWD = Kind(
    "bad_iscrowd", "annotation", True, "values of iscrowd other than 0 and 1", "`maskloss repair` sets 0"
)

#: Descriptions of the unusual forms of segmentations.
SPELLINGS = {
    FLAT_POLYGON: "segmentation is one flat list of numbers, read as one polygon",
    POINT_PAIRS: "segmentation has its points as [x, y] pairs",
    NESTED_POLYGONS: "segmentation has a list too many around its polygons",
    RLE_IN_LIST: "segmentation is an RLE inside a list",
    RLE_COUNTS: "segmentation: the RLE's counts are text of numbers or of Python's bytes, or base64",
}
#: States of an annotation's area: a number, missing, or anything else.
AREA_GIVEN, AREA_MISSING, AREA_ODD = 0, 1, 2
#: Stands for a missing id.
ABSENT: Any = object()
_NUMBER = (int, float)
_NAN = float("nan")


@dataclass
class ImageColumns:
    """The images of a file that have no errors, a list per field, in the file's order.

    Attributes:
        ids: ids of the images.
        names: names of the image files, as they exist.
        widths: widths in px.
        heights: heights in px.
        positions: positions in the file's list.
        faulty: ids of the images with errors, including ids that are not integers. Annotations that refer to one of
            them get no error of their own.
    """

    ids: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    faulty: set[Any] = field(default_factory=set)

    def remove(self, indices: set[int]) -> None:
        """Remove images by index, and add their ids to `faulty`."""
        self.faulty |= {self.ids[index] for index in indices}
        columns: list[list[Any]] = [self.ids, self.names, self.widths, self.heights, self.positions]
        for column in columns:
            column[:] = [value for index, value in enumerate(column) if index not in indices]

    def arrays(self) -> dict[str, Any]:
        """Return the images' fields of `Records`, by name."""
        return {
            "image_ids": integers(self.ids),
            "widths": np.array(self.widths, dtype=np.int64),
            "heights": np.array(self.heights, dtype=np.int64),
            "file_names": Texts.of([name.encode("utf-8", "surrogatepass") for name in self.names]),
        }


@dataclass(frozen=True)
class Fault:
    """A fault of one annotation, which is reported only if the annotation's image has no error."""

    kind: Kind
    position: int
    name: str
    detail: str
    image_id: Any


class Columns:
    """The annotations of a file, a column per field and a row per annotation that can be read.

    Compressed RLEs are not decoded here: `build_records` decodes all at once, which is several times as fast.

    Attributes:
        faults: faults of single annotations.
        odd_ids: by row, ids of more than 64 bits.
        odd_image_ids: by row, image_ids that are not integers, or have more than 64 bits; `ABSENT` if missing.
        odd_category_ids: by row, category_ids that are not integers, or have more than 64 bits; `ABSENT` if missing.
        odd_boxes: by row, the values of bbox that are not four finite numbers.
        odd_areas: by row, the values of area that are not numbers.
        degenerate: by row, the number of polygons with fewer than three points.
        weights: by row, the weight of an annotation that has one.
        points: by row, the labeled points (x, y, label) of an annotation that has some.
        rles: compressed counts of the RLEs, in the order of their rows.
        without_geometry: number of annotations with neither a bbox nor a segmentation.
        first_without_geometry: the first of them, or None.

    Args:
        may_have_booleans: whether coordinates may be booleans, which takes time to check.
    """

    def __init__(self, *, may_have_booleans: bool = True) -> None:
        self.may_have_booleans = may_have_booleans
        self.count = 0
        self.positions, self.ids = array("q"), array("q")
        self.image_ids, self.category_ids = array("q"), array("q")
        self.boxes, self.areas = array("d"), array("d")  # x, y, width, height; NaN for odd values
        self.has_id, self.crowds, self.forms, self.area_states = (
            bytearray(),
            bytearray(),
            bytearray(),
            bytearray(),
        )
        self.part_counts = array("q")
        self.point_counts, self.coordinates = array("q"), array("d")
        self.rles: list[bytes] = []
        self.rle_sizes = array("q")  # height and width of each RLE
        self.faults: list[Fault] = []
        self.odd_ids: dict[int, int] = {}
        self.odd_image_ids: dict[int, Any] = {}
        self.odd_category_ids: dict[int, Any] = {}
        self.odd_boxes: dict[int, Any] = {}
        self.odd_areas: dict[int, Any] = {}
        self.degenerate: dict[int, int] = {}
        self.weights: dict[int, float] = {}
        self.points: dict[int, list[tuple[float, float, int]]] = {}
        self.without_geometry = 0
        self.first_without_geometry: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.forms)

    def take(self, item: Any) -> None:
        """Add the next annotation of the file."""
        position, row = self.count, len(self)
        self.count += 1
        if not self._take_regular(position, item):
            self._take_any(position, item)
        if len(self) > row and ("weight" in item or "point_coords" in item or "point_labels" in item):
            self._take_supervision(position, row, item)

    def _take_regular(self, position: int, item: Any) -> bool:
        """Add an annotation of COCO's usual form (polygons or RLE, integer ids, all fields), or return False.

        Most annotations have this form, so this is the fast path.
        """
        points, parts, rows = len(self.coordinates), len(self.point_counts), len(self.forms)
        try:
            identity, image_id, category_id = item["id"], item["image_id"], item["category_id"]
            crowd, area, box, polygons = item["iscrowd"], item["area"], item["bbox"], item["segmentation"]
            if not (
                type(identity) is int
                and type(image_id) is int
                and type(category_id) is int
                and type(crowd) is int
                and (crowd == 0 or crowd == 1)
                and type(area) in _NUMBER
            ):
                return False
            counts = _usual_counts(polygons) if type(polygons) is dict else None
            if counts is None and not (type(polygons) is list and polygons):
                return False
            x, y, width, height = box
            if not (
                type(x) in _NUMBER
                and type(y) in _NUMBER
                and type(width) in _NUMBER
                and type(height) in _NUMBER
            ):
                return False
            for polygon in () if counts is not None else polygons:
                length = len(polygon)
                if type(polygon) is not list or length < 6 or length % 2:
                    raise TypeError
                if self.may_have_booleans and bool in map(type, polygon):
                    raise TypeError
                self.coordinates.extend(polygon)
                self.point_counts.append(length)
            form, parts_of_row = (POLYGONS, len(polygons)) if counts is None else (RLE, 1)
            self._add_row(position, identity, image_id, category_id, box, crowd, area, form, parts_of_row)
        except (TypeError, KeyError, ValueError, OverflowError):
            del self.coordinates[points:], self.point_counts[parts:]
            self._drop_rows(rows)
            return False
        if counts is not None:
            self.rles.append(counts)
            self.rle_sizes.extend(polygons["size"])
        self.has_id.append(1)
        self.area_states.append(AREA_GIVEN)
        return True

    def _add_row(
        self,
        position: int,
        identity: int,
        image_id: int,
        category_id: int,
        box: Any,
        crowd: int,
        area: float,
        form: int,
        parts: int,
    ) -> None:
        self.ids.append(identity)
        self.image_ids.append(image_id)
        self.category_ids.append(category_id)
        self.areas.append(area)
        self.boxes.extend(box)
        self.positions.append(position)
        self.crowds.append(crowd)
        self.part_counts.append(parts)
        self.forms.append(form)

    def _drop_rows(self, rows: int) -> None:
        for column in (self.ids, self.image_ids, self.category_ids, self.areas, self.positions, self.crowds):
            del column[rows:]
        del self.boxes[4 * rows :], self.part_counts[rows:], self.forms[rows:]

    def _take_supervision(self, position: int, row: int, item: dict[str, Any]) -> None:
        """Add the weight and the labeled points of the annotation in a row."""
        name, image_id = _name_of(position, item), item.get("image_id")
        try:
            if not is_absent(item.get("weight")):
                self.weights[row] = read_weight(item["weight"])
        except BadEntry as error:
            self.faults.append(Fault(error.kind, position, name, str(error), image_id))
        try:
            # Segment Anything writes the points of its prompt, which have no labels, beside its estimates of the mask.
            is_prompt = "point_labels" not in item and ("predicted_iou" in item or "stability_score" in item)
            if not is_prompt and ("point_coords" in item or "point_labels" in item):
                self.points[row] = read_points(item.get("point_coords"), item.get("point_labels"))
        except BadEntry as error:
            self.faults.append(Fault(error.kind, position, name, str(error), image_id))

    def _take_any(self, position: int, item: Any) -> None:
        if not isinstance(item, dict):
            name, kind = f"annotation number {position}", type(item).__name__
            self.faults.append(Fault(NO_OBJECT, position, name, f"expected an object, got {kind}", None))
            return
        if "bbox" not in item and "segmentation" not in item:
            self.without_geometry += 1
            self.first_without_geometry = self.first_without_geometry or item
        given = item.get("id")
        identity = whole_number(given)
        name, image_id = _name_of(position, item), item.get("image_id")

        def fault(kind: Kind, detail: str) -> None:
            self.faults.append(Fault(kind, position, name, detail, image_id))

        if identity is None and not is_absent(given):
            fault(TEXT_ID, f"id must be an integer, not {shown(given)}")
            return
        if identity is None:
            fault(MISSING_ID, "missing id; it gets a new one")
        crowd = read_crowd(item.get("iscrowd", 0))
        if crowd is None:
            fault(BAD_CROWD, f"iscrowd must be 0 or 1, not {shown(item['iscrowd'])}")
            return
        if "iscrowd" in item and type(item["iscrowd"]) is not int:
            fault(ODD_CROWD, f"iscrowd {shown(item['iscrowd'])} is read as {crowd}")
        try:
            segmentation = read_segmentation(item.get("segmentation"))
        except BadEntry as error:
            fault(error.kind, str(error))
            return
        for spelling in segmentation.spellings:
            fault(spelling, SPELLINGS[spelling])
        self._add_item(position, item, identity, crowd, segmentation, fault)

    def _add_item(
        self,
        position: int,
        item: dict[str, Any],
        identity: int | None,
        crowd: int,
        segmentation: Segmentation,
        fault: Any,
    ) -> None:
        row = len(self)
        numbers: list[int] = []
        floats = []
        if identity is not None and isinstance(item["id"], float):
            floats.append("id")
        for key, odd in (("image_id", self.odd_image_ids), ("category_id", self.odd_category_ids)):
            number = whole_number(item.get(key))
            if number is None:
                odd[row] = item.get(key, ABSENT)
            elif isinstance(item[key], float):
                floats.append(key)
            if number is not None and not _fits(number):
                odd[row], number = number, 0
            numbers.append(number or 0)
        if identity is not None and not _fits(identity):
            self.odd_ids[row] = identity
        if floats:
            fault(FLOAT_ID, f"{', '.join(floats)} {shown(item[floats[0]])} is read as an integer")
        box = read_box(item.get("bbox"))
        if box is None:
            self.odd_boxes[row] = item.get("bbox")
        area: Any = item.get("area")
        usable = is_number(area) or isinstance(area, float)
        if area is not None and not usable:
            self.odd_areas[row] = area
        if segmentation.rle is not None:
            form, parts = RLE, 1
            self.rles.append(segmentation.rle["counts"])
            self.rle_sizes.extend(segmentation.rle["size"])
        elif segmentation.empty:
            form, parts = NO_MASK, 0
        else:
            form, parts = POLYGONS, len(segmentation.polygons)
            for polygon in segmentation.polygons:
                self.coordinates.extend(polygon)
                self.point_counts.append(len(polygon))
            if segmentation.degenerate:
                self.degenerate[row] = segmentation.degenerate
        self._add_row(
            position, 0 if row in self.odd_ids else identity or 0, numbers[0], numbers[1],
            box or itertools.repeat(_NAN, 4), crowd, float(area) if usable else _NAN, form, parts,
        )  # fmt: skip
        self.has_id.append(identity is not None)
        self.area_states.append(AREA_GIVEN if usable else AREA_MISSING if area is None else AREA_ODD)


def _usual_counts(rle: dict[str, Any]) -> bytes | None:
    """Return the counts of a compressed RLE of a usual form and size, or None."""
    size, counts = rle["size"], rle["counts"]
    if not (type(counts) is str and counts.isascii() and type(size) is list):
        return None
    height, width = size
    usual = type(height) is int and type(width) is int and min(size) > 0 and height * width < LARGEST_RLE
    return counts.encode() if usual else None


def _name_of(position: int, item: dict[str, Any]) -> str:
    given = item.get("id")
    return f"annotation number {position}" if is_absent(given) else f"annotation {shown(given)}"


def _fits(number: int) -> bool:
    return -(2**63) <= number < 2**63


def integers(numbers: Sequence[int]) -> IntArray:
    """Make an array of integers, int64 or, if one has more than 64 bits, of Python integers."""
    return np.array(numbers, dtype=np.int64 if all(map(_fits, numbers)) else object)
