"""A table of all annotations of a file, which the checks of `data` measure and drop from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskloss.data.findings import Findings, Kind, shown
from maskloss.data.reading.columns import Columns, ImageColumns
from maskloss.data.records import POLYGONS, RLE, BoolArray, polygons_of
from maskloss.masks.encoded import FloatArray, IntArray


@dataclass
class AnnotationTable:
    """The annotations of a file in arrays of R rows, which the checks of `data` fill, and mark as dropped.

    Attributes:
        columns: what the arrays were made of, and the values that fit into no array.
        positions: (R,) position of each annotation in the file's list.
        ids: (R,) ids; 0 where there is none.
        image: (R,) index of the image, -1 if it is unknown.
        form: (R,) `NO_MASK`, `POLYGONS` or `RLE`.
        crowds: (R,) bool.
        kept: (R,) bool, False after a fault.
        boxes: (R, 4) x, y, width, height as in the file.
        part_first: (R,) index of the first polygon.
        part_count: (R,) number of polygons, or 1 for an RLE.
        point_first: (P,) offset of each polygon in `coordinates`.
        point_count: (P,) number of coordinates of each polygon.
        coordinates: x0, y0, x1, y1, ... of all polygons.
        rle_index: (R,) index into the RLEs.
        extents: (R, 4) xyxy of the mask, NaN without a mask.
        shoelace: (R,) sum of the polygons' areas, or number of pixels of the RLE.
        images: the images without errors.
        findings: receives what `report` and `drop` say.
    """

    columns: Columns
    positions: IntArray
    ids: IntArray
    image: IntArray
    form: Any
    crowds: BoolArray
    kept: BoolArray
    boxes: FloatArray
    part_first: IntArray
    part_count: IntArray
    point_first: IntArray
    point_count: IntArray
    coordinates: FloatArray
    rle_index: IntArray
    extents: FloatArray
    shoelace: FloatArray
    images: ImageColumns
    findings: Findings

    @classmethod
    def of_columns(cls, columns: Columns, images: ImageColumns, findings: Findings) -> AnnotationTable:
        """Make the table of all annotations, before any check."""
        rows = len(columns)
        form = np.array(columns.forms, dtype=np.uint8)
        point_count = np.array(columns.point_counts, dtype=np.int64)
        parts = np.where(form == POLYGONS, np.array(columns.part_counts, dtype=np.int64), 0)
        is_rle = form == RLE
        return cls(
            columns=columns,
            positions=np.array(columns.positions, dtype=np.int64),
            ids=with_large_ids(columns.ids, columns.odd_ids),
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

    def name(self, row: int) -> str:
        """Return what to call an annotation in a message: "annotation 7", or "annotation number 3" without an id."""
        has_id = self.columns.has_id[row]
        return f"annotation {self.ids[row]}" if has_id else f"annotation number {self.positions[row]}"

    def image_text(self, row: int) -> str:
        """Return the id and the file name of an annotation's image, in parentheses, to end a message with."""
        index = self.image[row]
        return f" (image {self.images.ids[index]}, {shown(self.images.names[index]).strip(chr(39))})"

    def size(self, row: int) -> tuple[int, int]:
        """Return the width and height of an annotation's image, in px."""
        return self.images.widths[self.image[row]], self.images.heights[self.image[row]]

    def sizes(self) -> FloatArray:
        """Return the width and height of each row's image, (R, 2) in px."""
        sides = np.array([self.images.widths, self.images.heights], dtype=np.float64).reshape(2, -1)
        if not sides.shape[1]:
            return np.ones((len(self.kept), 2))
        return sides[:, np.maximum(self.image, 0)].T

    def report(self, kind: Kind, row: int, text: str) -> None:
        """Add an annotation to the findings."""
        self.findings.add(kind, int(self.positions[row]), self.name(row), text + self.image_text(row))

    def drop(self, kind: Kind, rows: Iterable[Any], text: Callable[[int], str]) -> None:
        """Add annotations to the findings, with a text for each row, and mark them as dropped."""
        for row in rows:
            self.report(kind, int(row), text(int(row)))
            self.kept[row] = False

    def polygons(self, row: int) -> list[FloatArray]:
        """Return an annotation's polygons, each (V, 2) xy in px."""
        parts = slice(self.part_first[row], self.part_first[row] + self.part_count[row])
        return polygons_of(self.coordinates, self.point_first[parts], self.point_count[parts])


def with_large_ids(column: Any, odd: dict[int, Any]) -> IntArray:
    """Return a column of ids as an array, including the ids of more than 64 bits from `odd`."""
    large = {row: value for row, value in odd.items() if type(value) is int}
    if not large:
        return np.array(column, dtype=np.int64)
    ids = np.array(column, dtype=object)
    for row, value in large.items():
        ids[row] = value
    return ids
