"""Annotations of a data set in a few numpy arrays, and light views of its images and annotations.

COCO's training set has 860,001 annotations. As Python objects they take 2.4 GiB, of which each data-loader process
copies a half as it counts references; as arrays they take 0.3 GiB, which processes share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from maskloss.masks.coco_format import count_pixels
from maskloss.masks.coverage import union_area
from maskloss.masks.encoded import EncodedMasks, FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]
ByteArray = npt.NDArray[np.uint8]

#: What `Records.form` says of an annotation's segmentation.
NO_MASK, POLYGONS, RLE = 0, 1, 2


@dataclass(frozen=True)
class Category:
    """A category of the annotation file; ids may have gaps."""

    id: int
    name: str


@dataclass(frozen=True)
class Texts:
    """A sequence of byte strings in one array.

    Attributes:
        content: all strings, joined.
        start: (T,) where each begins.
        length: (T,) bytes of each.
    """

    content: ByteArray
    start: IntArray
    length: IntArray

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> Texts:
        """Join byte strings."""
        length = np.array([len(text) for text in texts], dtype=np.int64)
        content = np.frombuffer(b"".join(texts), dtype=np.uint8)
        return cls(content, length.cumsum() - length, length)

    def __getitem__(self, index: int) -> bytes:
        start = self.start[index]
        return self.content[start : start + self.length[index]].tobytes()


@dataclass(frozen=True, eq=False)
class Records:
    """N images and A annotations, sorted by image, in arrays.

    Attributes:
        image_ids: (N,) int64.
        widths: (N,) int64, px.
        heights: (N,) int64, px.
        file_names: N strings, UTF-8 with surrogates passed on.
        first: (N + 1,) int64; image n has the annotations from first[n] up to first[n + 1].
        ids: (A,) int64.
        category_ids: (A,) int64.
        boxes: (A, 4) float64, xyxy in px, inside the image.
        crowds: (A,) bool.
        areas: (A,) float64, px²; NaN where the file gives none that is usable, so that the mask's is.
        form: (A,) uint8, `NO_MASK`, `POLYGONS` or `RLE`.
        part_first: (A,) int64, its first polygon, or its RLE.
        part_count: (A,) int64, its number of polygons, or 1.
        point_first: (P,) int64, where in `coordinates` each polygon begins.
        point_count: (P,) int64, its coordinates: twice its points.
        coordinates: float64, x0, y0, x1, y1, ... of all polygons.
        rles: compressed counts.
    """

    image_ids: IntArray
    widths: IntArray
    heights: IntArray
    file_names: Texts
    first: IntArray
    ids: IntArray
    category_ids: IntArray
    boxes: FloatArray
    crowds: BoolArray
    areas: FloatArray
    form: ByteArray
    part_first: IntArray
    part_count: IntArray
    point_first: IntArray
    point_count: IntArray
    coordinates: FloatArray
    rles: Texts

    def __eq__(self, other: object) -> bool:
        """Compare the arrays, NaN being equal to NaN."""
        if not isinstance(other, Records):
            return NotImplemented
        return self is other or all(
            np.array_equal(mine, its, equal_nan=mine.dtype.kind == "f")
            for mine, its in zip(self._arrays(), other._arrays(), strict=True)
        )

    def _arrays(self) -> list[npt.NDArray[Any]]:
        values = [getattr(self, field.name) for field in fields(self)]
        return [
            array
            for value in values
            for array in (
                (value.content, value.start, value.length) if isinstance(value, Texts) else (value,)
            )
        ]

    @property
    def nbytes(self) -> int:
        """Memory of all arrays."""
        return sum(array.nbytes for array in self._arrays())

    def polygons(self, row: int) -> list[FloatArray]:
        """Give an annotation's polygons as (V, 2) xy."""
        parts = slice(self.part_first[row], self.part_first[row] + self.part_count[row])
        return polygons_of(self.coordinates, self.point_first[parts], self.point_count[parts])

    def image_of(self, row: int) -> int:
        """Return the index of an annotation's image."""
        return int(np.searchsorted(self.first, row, side="right")) - 1

    def mask(self, row: int) -> Any:
        """Give an annotation's polygons, its RLE, or None, as `EncodedMasks.of_checked` takes them."""
        if self.form[row] == POLYGONS:
            return self.polygons(row)
        if self.form[row] == RLE:
            image = self.image_of(row)
            size = [int(self.heights[image]), int(self.widths[image])]
            return {"size": size, "counts": self.rles[int(self.part_first[row])]}
        return None

    def area(self, row: int) -> float:
        """Give an annotation's area in px²: as the file has it, or the mask's, or without a mask the box's."""
        if not np.isnan(self.areas[row]):
            return float(self.areas[row])
        return self.mask_area(row)

    def mask_area(self, row: int) -> float:
        """Compute an annotation's area in px² from its mask, or without one from its box."""
        if self.form[row] == NO_MASK:
            x1, y1, x2, y2 = self.boxes[row].tolist()
            return float((x2 - x1) * (y2 - y1))
        if self.form[row] == RLE:
            return float(coco_mask.area(self.mask(row)))
        polygons = self.polygons(row)
        image = self.image_of(row)
        width, height = int(self.widths[image]), int(self.heights[image])
        if all((polygon >= 0).all() and (polygon <= (width, height)).all() for polygon in polygons):
            return union_area(polygons)
        # What lies beyond the border is no part of the mask.
        return float(count_pixels(polygons, height, width))


def polygons_of(coordinates: FloatArray, first: IntArray, count: IntArray) -> list[FloatArray]:
    """Return polygons as (V, 2) xy, of which each has `count` coordinates from `first` on."""
    return [
        coordinates[begin : begin + length].reshape(-1, 2)
        for begin, length in zip(first.tolist(), count.tolist(), strict=True)
    ]


def polygon_extents(
    coordinates: FloatArray, first: IntArray, count: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Find each polygon's least and largest x and y, (P, 2).

    Args:
        coordinates: x0, y0, x1, y1, ... of all polygons.
        first: (P,) rising, where each begins; between two there may be coordinates of neither.
        count: (P,) how many coordinates it has.
    """
    low, high = np.empty((len(first), 2)), np.empty((len(first), 2))
    # In parts, for the copies to be small.
    for start in range(0, len(first), 50_000):
        part = slice(start, start + 50_000)
        begin, end = first[part][0], first[part][-1] + count[part][-1]
        points = coordinates[begin:end].reshape(-1, 2)
        heads = (first[part] - begin) // 2
        # By turns from a polygon's beginning to its end, and from there to the next one's beginning.
        bounds = np.stack([heads, heads + count[part] // 2], axis=1).reshape(-1)[:-1]
        low[part] = np.minimum.reduceat(points, bounds)[::2]
        high[part] = np.maximum.reduceat(points, bounds)[::2]
    return low, high


@dataclass(frozen=True)
class Annotation:
    """A view of one annotated object.

    Attributes:
        records: of the data set.
        row: of the annotation in them.
    """

    records: Records
    row: int

    @property
    def id(self) -> int:
        """The id in the file, or a new one where it has none of its own."""
        return int(self.records.ids[self.row])

    @property
    def category_id(self) -> int:
        """The category's id in the file."""
        return int(self.records.category_ids[self.row])

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2 in px, inside the image."""
        x1, y1, x2, y2 = self.records.boxes[self.row].tolist()
        return x1, y1, x2, y2

    @property
    def crowd(self) -> bool:
        """Whether it is a region with many objects: never a positive, ignored in evaluation."""
        return bool(self.records.crowds[self.row])

    @property
    def has_mask(self) -> bool:
        """Whether it has a mask, or a box only."""
        return bool(self.records.form[self.row] != NO_MASK)

    @property
    def segmentation(self) -> Any:
        """Polygons `[x0, y0, x1, y1, ...]` without the degenerate ones, an RLE with compressed counts, or None."""
        mask = self.records.mask(self.row)
        return [polygon.reshape(-1).tolist() for polygon in mask] if isinstance(mask, list) else mask

    @property
    def area(self) -> float:
        """The area in px²: as the file has it where that is usable, or else the mask's, or the box's."""
        return self.records.area(self.row)


@dataclass(frozen=True)
class ImageRecord:
    """A view of one image and its annotations.

    Attributes:
        records: of the data set.
        index: of the image in them.
    """

    records: Records
    index: int

    @property
    def id(self) -> int:
        """The id in the file."""
        return int(self.records.image_ids[self.index])

    @property
    def file_name(self) -> str:
        """The name relative to the image folder."""
        return self.records.file_names[self.index].decode("utf-8", "surrogatepass")

    @property
    def width(self) -> int:
        """The width in px."""
        return int(self.records.widths[self.index])

    @property
    def height(self) -> int:
        """The height in px."""
        return int(self.records.heights[self.index])

    @property
    def rows(self) -> range:
        """The rows of the annotations."""
        return range(int(self.records.first[self.index]), int(self.records.first[self.index + 1]))

    @property
    def object_rows(self) -> IntArray:
        """The rows of `objects`."""
        rows = np.arange(self.rows.start, self.rows.stop)
        return rows[~self.records.crowds[self.rows.start : self.rows.stop]]

    @property
    def annotations(self) -> list[Annotation]:
        """All annotations, in the file's order."""
        return [Annotation(self.records, row) for row in self.rows]

    @property
    def objects(self) -> list[Annotation]:
        """The annotations that can be a positive: all but the crowds."""
        return [Annotation(self.records, int(row)) for row in self.object_rows]

    def object_masks(self) -> EncodedMasks:
        """Return the masks of `objects`, in their order."""
        masks = [self.records.mask(int(row)) for row in self.object_rows]
        return EncodedMasks.of_checked(masks, self.height, self.width)


@dataclass(frozen=True)
class ImageRecords(Sequence[ImageRecord]):
    """The images of a data set, in the file's order, each made when it is asked for."""

    records: Records

    def __len__(self) -> int:
        return len(self.records.image_ids)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...

    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(index, slice):
            return [ImageRecord(self.records, i) for i in range(len(self))[index]]
        return ImageRecord(self.records, range(len(self))[index])

    def __iter__(self) -> Iterator[ImageRecord]:
        return (ImageRecord(self.records, index) for index in range(len(self)))


@dataclass(frozen=True)
class CocoData:
    """A checked COCO-format data set.

    Attributes:
        annotation_file: where it was read from.
        image_folder: where the images are.
        records: its images and annotations.
        categories: by rising id; label i + 1 is category i, and 0 is background.
        warnings: what was repaired or is odd, a line for each kind.
    """

    annotation_file: Path
    image_folder: Path
    records: Records
    categories: tuple[Category, ...]
    warnings: list[str]

    @property
    def images(self) -> ImageRecords:
        """The images, in the file's order."""
        return ImageRecords(self.records)

    def image_path(self, image: ImageRecord) -> Path:
        """Return where the image's file is."""
        return self.image_folder / image.file_name

    @property
    def labels(self) -> dict[int, int]:
        """The label of each category id, from 1."""
        return {category.id: index + 1 for index, category in enumerate(self.categories)}

    @property
    def num_objects(self) -> int:
        """Annotations that can be a positive."""
        return int((~self.records.crowds).sum())

    @property
    def num_crowds(self) -> int:
        """Annotations that are regions with many objects."""
        return int(self.records.crowds.sum())

    @property
    def num_masks(self) -> int:
        """Objects with a mask."""
        return int((~self.records.crowds & (self.records.form != NO_MASK)).sum())
