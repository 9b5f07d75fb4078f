"""Reading single fields of an annotation file, in the various forms in which annotation tools write them."""

from __future__ import annotations

import ast
import base64
import contextlib
import math
import numbers
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from maskloss.data.findings import Kind, shown
from maskloss.masks.encoded import checked_rle

_KEEPS_BOX = "`maskloss repair` keeps their boxes without them"

FLAT_POLYGON = Kind(
    "flat_polygon",
    "annotation",
    False,
    "segmentations that are one flat list of numbers are read as one polygon",
)
POINT_PAIRS = Kind(
    "point_pairs", "annotation", False, "segmentations with points as [x, y] pairs are read as polygons"
)
NESTED_POLYGONS = Kind(
    "nested_polygons",
    "annotation",
    False,
    "segmentations with a list too many around their polygons are read",
)
RLE_IN_LIST = Kind(
    "rle_in_list", "annotation", False, "segmentations that are RLEs inside a list are read as RLEs"
)
RLE_COUNTS = Kind(
    "rle_counts",
    "annotation",
    False,
    "RLEs whose counts are text of numbers or of Python's bytes, or base64, are read",
)
BAD_SEGMENTATION = Kind(
    "bad_segmentation", "annotation", True, "segmentations that cannot be read", _KEEPS_BOX
)
CORRUPT_RLE = Kind("corrupt_rle", "annotation", True, "RLEs that are corrupt", _KEEPS_BOX)
RLE_SIZE = Kind(
    "rle_size",
    "annotation",
    True,
    "RLEs whose size is not the image's",
    "`maskloss repair` transposes those that then fit their boxes, and keeps the boxes of the others",
)


BAD_WEIGHT = Kind(
    "bad_weight",
    "annotation",
    True,
    "weights that are not finite numbers >= 0",
    "`maskloss repair` removes them, so that they count as 1",
)
BAD_POINTS = Kind(
    "bad_points",
    "annotation",
    True,
    "point_coords or point_labels that cannot be read",
    "`maskloss repair` removes those points",
)

#: Bound on the absolute value of ids. Some tools use 64-bit hashes or 128-bit UUIDs as ids.
ID_LIMIT = 2**128
#: Most letters of a category's name, also in model files.
LONGEST_NAME = 1_000


#: Bound on the pixels of an RLE, whose runs have 32 bits in pycocotools.
LARGEST_RLE = 2**31
#: Labels of points: outside the object, inside it, and without a label.
POINT_LABELS = (0, 1, -1)


class BadEntry(ValueError):
    """Raised when a field cannot be read.

    Args:
        kind: kind of the fault.
        text: description of the fault.
    """

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass
class Segmentation:
    """The content of a segmentation field.

    Attributes:
        polygons: polygons of at least three points each.
        rle: compressed RLE with its size, or None for polygons.
        degenerate: number of polygons with fewer than three points.
        spellings: unusual forms in which the segmentation was written.
    """

    polygons: list[list[float]] = field(default_factory=list)
    rle: dict[str, Any] | None = None
    degenerate: int = 0
    spellings: list[Kind] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether the field contains no polygons and no RLE, so that the annotation has only a box."""
        return not self.polygons and self.rle is None and not self.degenerate


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; text and booleans are not."""
    if type(value) is float:  # faster than the test below
        return math.isfinite(value)
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def is_absent(value: Any) -> bool:
    """Return whether a value is null, or NaN, which pandas writes for a missing value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def whole_number(value: Any) -> int | None:
    """Return an integer, or a whole float such as 3.0 (written by pandas), as an integer.

    Returns None for all other values, and for integers of more than 128 bits.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < ID_LIMIT:
        return value
    return None


def spelled_number(value: Any) -> int | None:
    """Return the integer that text such as "7" or "7.0" spells, 1 or 0 for a boolean, or None for all other values."""
    if isinstance(value, bool):
        return int(value)
    match = re.fullmatch(r"\s*(-?[0-9]{1,39})(\.0*)?\s*", value) if isinstance(value, str) else None
    return None if match is None else whole_number(int(match[1]))


def are_equal(one: Any, other: Any) -> bool:
    """Return whether two entries of a file are equal, word for word."""
    try:
        return bool(one == other)
    except RecursionError:  # nested too deeply to be compared
        return False


def possible_ids(value: Any) -> set[Any]:
    """Return the ids by which annotations may refer to an entry: the one that is written, and the number it spells."""
    plain = value if isinstance(value, str | int | float) else shown(value)
    return {plain, spelled_number(value)} - {None}


def read_crowd(value: Any) -> int | None:
    """Return an iscrowd value in any unambiguous form as 0 or 1, or None for all other values."""
    if is_absent(value) or value == "":
        return 0
    if value in (0, 1):
        return int(value)
    return {"0": 0, "1": 1, "false": 0, "true": 1}.get(value.lower()) if isinstance(value, str) else None


def read_box(value: Any) -> tuple[float, float, float, float] | None:
    """Return x, y, width and height as floats, or None if the value is not a list of four finite numbers."""
    if not (isinstance(value, list) and len(value) == 4 and all(is_number(number) for number in value)):
        return None
    x, y, width, height = map(float, value)
    return x, y, width, height


def read_segmentation(value: Any) -> Segmentation:
    """Read a segmentation in any unambiguous form.

    Raises:
        BadEntry: the segmentation cannot be read, or its form is ambiguous.
    """
    result = Segmentation()
    if is_absent(value) or value in ("", {}, []):
        return result
    if isinstance(value, dict):
        result.rle = _read_rle(value, result)
        return result
    if not isinstance(value, list):
        raise BadEntry(
            BAD_SEGMENTATION, f"segmentation must be a list of polygons or an RLE, not {shown(value)}"
        )
    if all(isinstance(part, dict) and ("counts" in part or "size" in part) for part in value):
        rles = [_read_rle(part, result) for part in value]
        if any(rle["size"] != rles[0]["size"] for rle in rles):
            raise BadEntry(RLE_SIZE, "segmentation: the RLEs in the list have different sizes")
        result.rle = rles[0] if len(rles) == 1 else coco_mask.merge(rles)
        result.spellings[:] = [RLE_IN_LIST, *dict.fromkeys(result.spellings)]
        return result
    for polygon in _flat_polygons(value, result):
        _add_polygon(polygon, result)
    return result


def _flat_polygons(value: list[Any], result: Segmentation) -> list[Any]:
    """Return flat polygons from a list of numbers, of points, of flat polygons, of polygons of points, or of a list."""
    if not any(isinstance(part, list | dict) for part in value):
        result.spellings.append(FLAT_POLYGON)
        return [value]
    if len(value) == 1 and all(isinstance(part, list) and len(part) >= 6 for part in value[0] or [None]):
        result.spellings.append(NESTED_POLYGONS)
        return _flat_polygons(value[0], result)
    if len(value) > 2 and all(_is_point(part) for part in value):
        result.spellings.append(POINT_PAIRS)
        return [_flatten(value)]
    # In OpenCV's contours, each point is nested in another list.
    if len(value) > 2 and all(
        isinstance(part, list) and len(part) == 1 and _is_point(part[0]) for part in value
    ):
        result.spellings.append(POINT_PAIRS)
        return [_flatten([part[0] for part in value])]
    polygons = []
    for part in value:
        if (
            isinstance(part, list)
            and part
            and all(isinstance(point, list) and len(point) == 1 and _is_point(point[0]) for point in part)
        ):
            part = [point[0] for point in part]
        if isinstance(part, list) and part and all(_is_point(point) for point in part):
            result.spellings.append(POINT_PAIRS)
            part = _flatten(part)
        polygons.append(part)
    result.spellings[:] = dict.fromkeys(result.spellings)
    return polygons


def _is_point(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and not any(isinstance(v, list | dict) for v in value)
    ) or (isinstance(value, dict) and value.keys() == {"x", "y"})


def _flatten(points: Sequence[Any]) -> list[Any]:
    return [v for point in points for v in ((point["x"], point["y"]) if isinstance(point, dict) else point)]


def _add_polygon(polygon: Any, result: Segmentation) -> None:
    if not isinstance(polygon, list):
        raise BadEntry(
            BAD_SEGMENTATION,
            f"segmentation: a polygon is a flat list of numbers x0, y0, x1, y1, ..., not {shown(polygon)}",
        )
    # The test of whole lists takes a tenth of the time of tests of their numbers.
    usual = set(map(type, polygon)) <= {int, float}
    for number in () if usual and _are_finite(polygon) else polygon:
        if not isinstance(number, numbers.Real) or isinstance(number, bool):
            raise BadEntry(
                BAD_SEGMENTATION,
                "segmentation: a polygon is a flat list of numbers x0, y0, x1, y1, ..., but this one holds "
                f"{shown(number)}",
            )
        if not is_number(number):
            raise BadEntry(BAD_SEGMENTATION, "segmentation: a polygon has a coordinate that is not finite")
    if len(polygon) % 2:
        raise BadEntry(
            BAD_SEGMENTATION, f"segmentation: a polygon has an odd number of coordinates ({len(polygon)})"
        )
    if len(polygon) >= 6:
        result.polygons.append(polygon)
    elif polygon:
        result.degenerate += 1


def _are_finite(values: list[Any]) -> bool:
    try:
        return all(map(math.isfinite, values))
    except OverflowError:  # an integer too large for a float
        return False


def _read_rle(value: dict[str, Any], result: Segmentation) -> dict[str, Any]:
    """Return a compressed RLE, and add to the result's spellings if its counts are written in an unusual form."""
    if "size" not in value or "counts" not in value:
        raise BadEntry(
            CORRUPT_RLE,
            f"segmentation: an RLE needs the keys size and counts, got {shown(sorted(map(str, value)))}",
        )
    sides = value["size"] if isinstance(value["size"], list) and len(value["size"]) == 2 else [None]
    size = [whole_number(side) or 0 for side in sides]
    if min(size) <= 0 or size[0] * size[1] >= LARGEST_RLE:
        raise BadEntry(RLE_SIZE, f"segmentation: the RLE's size is {shown(value['size'])}")
    counts = value["counts"]
    kinds = set(map(type, counts)) if isinstance(counts, list) else set()
    if bool in kinds:
        raise BadEntry(CORRUPT_RLE, "segmentation: the RLE's counts hold booleans")
    if float in kinds:
        whole = [whole_number(run) for run in counts]
        counts = counts if None in whole else whole
    try:
        return checked_rle({"size": size, "counts": counts}, size[0], size[1], "segmentation")
    except ValueError as error:
        cause = str(error)
    for spelled in _spelled_counts(counts) if isinstance(counts, str) else ():
        with contextlib.suppress(ValueError):
            rle = checked_rle({"size": size, "counts": spelled}, size[0], size[1], "segmentation")
            result.spellings.append(RLE_COUNTS)
            return rle
    raise BadEntry(CORRUPT_RLE, cause)


def _spelled_counts(text: str) -> Iterator[Any]:
    """Yield what counts may mean that are no compressed counts themselves.

    Only one meaning can be right: its runs have to cover exactly the pixels of the RLE's size.
    """
    if re.fullmatch(r"b'.*'|b\".*\"", text):
        with contextlib.suppress(ValueError, SyntaxError):
            yield ast.literal_eval(text)
        yield text[2:-1]
    if re.fullmatch(r"[\[\](),\s0-9]+", text):
        yield [int(number) for number in re.findall(r"[0-9]{1,18}", text)]
    with contextlib.suppress(ValueError):
        yield base64.b64decode(text, validate=True)


def read_weight(value: Any) -> float:
    """Return an annotation's weight.

    Raises:
        BadEntry: the weight is not a finite number >= 0.
    """
    if not is_number(value) or value < 0:
        raise BadEntry(BAD_WEIGHT, f"weight must be a finite number >= 0, not {shown(value)}")
    return float(value)


def read_points(coordinates: Any, labels: Any) -> list[tuple[float, float, int]]:
    """Return an annotation's labeled points, x and y in px and a label of `POINT_LABELS`, as Detectron2 writes them.

    Args:
        coordinates: list of [x, y].
        labels: list of labels, one per point.

    Raises:
        BadEntry: the lists cannot be read, or have different lengths.
    """
    if not isinstance(coordinates, list) or not isinstance(labels, list):
        raise BadEntry(
            BAD_POINTS, "point_coords and point_labels must both be lists, of [x, y] and of labels 1 and 0"
        )
    if len(coordinates) != len(labels):
        raise BadEntry(
            BAD_POINTS, f"there are {len(coordinates)} point_coords, but {len(labels)} point_labels"
        )
    return [_read_point(point, label) for point, label in zip(coordinates, labels, strict=True)]


def _read_point(point: Any, label: Any) -> tuple[float, float, int]:
    if not (isinstance(point, list) and len(point) == 2 and all(is_number(v) for v in point)):
        raise BadEntry(BAD_POINTS, f"point_coords: a point is [x, y] in px, not {shown(point)}")
    number = whole_number(label)
    if number not in POINT_LABELS:
        raise BadEntry(
            BAD_POINTS,
            f"point_labels: a label is 1 inside the object, 0 outside or -1 for none, not {shown(label)}",
        )
    return float(point[0]), float(point[1]), number


def box_of_mask(segmentation: Segmentation) -> list[float]:
    """Return x, y, width and height of the box around a mask that is not empty."""
    if segmentation.rle is not None:
        box: list[float] = coco_mask.toBbox(segmentation.rle).tolist()
        return box
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in segmentation.polygons])
    low, high = points.min(axis=0), points.max(axis=0)
    return [*low.tolist(), *(high - low).tolist()]
