"""The images and annotations of a data set in a few numpy arrays, and lightweight views of them.

COCO's training set has 860,001 annotations. As Python objects they take 2.4 GiB, half of which each data-loader process
copies because reference counts change; as arrays they take 0.3 GiB, which the processes share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
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

#: Forms of segmentations, the values of `Records.form`.
NO_MASK, POLYGONS, RLE = 0, 1, 2


@dataclass(frozen=True)
class Category:
    """A category of the annotation file. The ids of a file need not be contiguous."""

    id: int
    name: str


@dataclass(frozen=True)
class Texts:
    """A sequence of byte strings in one array.

    Attributes:
        content: all strings, concatenated.
        start: (T,) offset of each string.
        length: (T,) length of each string in bytes.
    """

    content: ByteArray
    start: IntArray
    length: IntArray

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> Texts:
        """Make `Texts` from byte strings."""
        length = np.array([len(text) for text in texts], dtype=np.int64)
        content = np.frombuffer(b"".join(texts), dtype=np.uint8)
        return cls(content, length.cumsum() - length, length)

    def __getitem__(self, index: int) -> bytes:
        start = self.start[index]
        return self.content[start : start + self.length[index]].tobytes()


@dataclass(frozen=True, eq=False)
class Records:
    """The N images and A annotations of a data set in arrays, with the annotations sorted by image.

    Attributes:
        image_ids: (N,) int64.
        widths: (N,) int64, px.
        heights: (N,) int64, px.
        file_names: N strings, encoded as UTF-8 with "surrogatepass".
        first: (N + 1,) int64; the annotations of image n are the rows first[n] up to, but not including, first[n + 1].
        ids: (A,) int64.
        category_ids: (A,) int64.
        boxes: (A, 4) float64, xyxy in px, inside the image.
        crowds: (A,) bool.
        areas: (A,) float64, px²; NaN if the file has no usable value, so that the mask's area is used.
        form: (A,) uint8, `NO_MASK`, `POLYGONS` or `RLE`.
        part_first: (A,) int64, index of the first polygon, or of the RLE.
        part_count: (A,) int64, number of polygons, or 1 for an RLE.
        point_first: (P,) int64, offset of each polygon in `coordinates`.
        point_count: (P,) int64, number of coordinates of each polygon, twice its number of points.
        coordinates: float64, x0, y0, x1, y1, ... of all polygons.
        rles: compressed counts of all RLEs.
        weights: (A,) float64 >= 0, or (0,) if no annotation has a weight.
        points: (T, 3) float64, x and y in px and the label of all labeled points: 1 inside the object, 0 outside, -1
            for no label.
        first_point: (A + 1,) int64; the points of annotation a are the rows first_point[a] up to, but not including,
            first_point[a + 1]. (0,) if no annotation has points.
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
    weights: FloatArray = field(default_factory=lambda: np.empty(0))
    points: FloatArray = field(default_factory=lambda: np.empty((0, 3)))
    first_point: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def __eq__(self, other: object) -> bool:
        """Return whether all arrays are equal, with NaN equal to NaN."""
        if not isinstance(other, Records):
            return NotImplemented
        return self is other or all(
            np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
            for a, b in zip(self._arrays(), other._arrays(), strict=True)
        )

    def _arrays(self) -> list[npt.NDArray[Any]]:
        values = [getattr(self, column.name) for column in fields(self)]
        return [
            array
            for value in values
            for array in (
                (value.content, value.start, value.length) if isinstance(value, Texts) else (value,)
            )
        ]

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        return sum(array.nbytes for array in self._arrays())

    def polygons(self, row: int) -> list[FloatArray]:
        """Return an annotation's polygons, each (V, 2) xy in px."""
        parts = slice(self.part_first[row], self.part_first[row] + self.part_count[row])
        return polygons_of(self.coordinates, self.point_first[parts], self.point_count[parts])

    def image_of(self, row: int) -> int:
        """Return the index of an annotation's image."""
        return int(np.searchsorted(self.first, row, side="right")) - 1

    def mask(self, row: int) -> Any:
        """Return an annotation's polygons, its RLE, or None without a mask, as `EncodedMasks.of_checked` takes them."""
        if self.form[row] == POLYGONS:
            return self.polygons(row)
        if self.form[row] == RLE:
            image = self.image_of(row)
            size = [int(self.heights[image]), int(self.widths[image])]
            return {"size": size, "counts": self.rles[int(self.part_first[row])]}
        return None

    def points_of(self, row: int) -> FloatArray:
        """Return an annotation's labeled points, (K, 3): x and y in px, and the label."""
        if not len(self.first_point):
            return np.empty((0, 3))
        return self.points[self.first_point[row] : self.first_point[row + 1]]

    @property
    def has_points(self) -> BoolArray:
        """Whether each annotation has a point that is labeled, (A,) bool."""
        has_points = np.zeros(len(self.ids), dtype=bool)
        if len(self.first_point):
            owner = np.repeat(np.arange(len(self.ids)), np.diff(self.first_point))
            has_points[owner[self.points[:, 2] >= 0]] = True
        return has_points

    def area(self, row: int) -> float:
        """Return an annotation's area in px²: the file's value if usable, else the area of the mask or the box."""
        if not np.isnan(self.areas[row]):
            return float(self.areas[row])
        return self.mask_area(row)

    def mask_area(self, row: int) -> float:
        """Compute an annotation's area in px² from its mask, or from its box if it has no mask."""
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
        # The parts of polygons beyond the border do not belong to the mask.
        return float(count_pixels(polygons, height, width))


def polygons_of(coordinates: FloatArray, first: IntArray, count: IntArray) -> list[FloatArray]:
    """Return polygons, each (V, 2) xy, given the offset of its first coordinate and its number of coordinates."""
    return [
        coordinates[begin : begin + length].reshape(-1, 2)
        for begin, length in zip(first.tolist(), count.tolist(), strict=True)
    ]


def polygon_extents(
    coordinates: FloatArray, first: IntArray, count: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Return each polygon's smallest and largest x and y, (P, 2) each.

    Args:
        coordinates: x0, y0, x1, y1, ... of all polygons.
        first: (P,) offset of each polygon, ascending. There may be unused coordinates between two polygons.
        count: (P,) number of coordinates of each polygon.
    """
    low, high = np.empty((len(first), 2)), np.empty((len(first), 2))
    # In chunks, to keep the temporary copies small.
    for start in range(0, len(first), 50_000):
        part = slice(start, start + 50_000)
        begin, end = first[part][0], first[part][-1] + count[part][-1]
        points = coordinates[begin:end].reshape(-1, 2)
        heads = (first[part] - begin) // 2
        # Alternately the first point of a polygon and the one after its last; every other segment is a polygon.
        bounds = np.stack([heads, heads + count[part] // 2], axis=1).reshape(-1)[:-1]
        low[part] = np.minimum.reduceat(points, bounds)[::2]
        high[part] = np.maximum.reduceat(points, bounds)[::2]
    return low, high


@dataclass(frozen=True)
class Annotation:
    """A view of one annotated object.

    Attributes:
        records: the data set's records.
        row: the annotation's row in the records.
    """

    records: Records
    row: int

    @property
    def id(self) -> int:
        """The id in the file, or a new id if the annotation has none, or one that another annotation has."""
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
        """Whether this is a crowd, a region with many objects: never a positive, and ignored in evaluation."""
        return bool(self.records.crowds[self.row])

    @property
    def has_mask(self) -> bool:
        """Whether the annotation has a mask, or only a box."""
        return bool(self.records.form[self.row] != NO_MASK)

    @property
    def segmentation(self) -> Any:
        """The polygons `[x0, y0, x1, y1, ...]` except degenerate ones, an RLE with compressed counts, or None."""
        mask = self.records.mask(self.row)
        return [polygon.reshape(-1).tolist() for polygon in mask] if isinstance(mask, list) else mask

    @property
    def area(self) -> float:
        """The area in px²: the file's value if it is usable, else the area of the mask or the box."""
        return self.records.area(self.row)


@dataclass(frozen=True)
class ImageRecord:
    """A view of one image and its annotations.

    Attributes:
        records: the data set's records.
        index: the image's index in the records.
    """

    records: Records
    index: int

    @property
    def id(self) -> int:
        """The id in the file."""
        return int(self.records.image_ids[self.index])

    @property
    def file_name(self) -> str:
        """The file's name, relative to the image folder."""
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
        """The annotations that can be positives: all except crowds."""
        return [Annotation(self.records, int(row)) for row in self.object_rows]

    def object_masks(self) -> EncodedMasks:
        """Return the masks of `objects`, in the same order."""
        masks = [self.records.mask(int(row)) for row in self.object_rows]
        return EncodedMasks.of_checked(masks, self.height, self.width)


@dataclass(frozen=True)
class ImageRecords(Sequence[ImageRecord]):
    """The images of a data set as a sequence, in the file's order; each view is created on access."""

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
    """A validated COCO-format data set.

    Attributes:
        annotation_file: file that the data set was read from.
        image_folder: folder of the images.
        records: the images and annotations.
        categories: the categories, sorted by id. Label i + 1 is categories[i]; label 0 is the background.
        warnings: corrections and oddities, one line for each kind.
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
        """Return the path of an image's file."""
        return self.image_folder / image.file_name

    @property
    def labels(self) -> dict[int, int]:
        """The label of each category by its id; labels start at 1."""
        return {category.id: index + 1 for index, category in enumerate(self.categories)}

    @property
    def num_objects(self) -> int:
        """Number of annotations that can be positives."""
        return int((~self.records.crowds).sum())

    @property
    def num_crowds(self) -> int:
        """Number of annotations that are crowds, regions with many objects."""
        return int(self.records.crowds.sum())

    @property
    def num_points(self) -> int:
        """Number of objects with labeled points."""
        return int((~self.records.crowds & self.records.has_points).sum())

    @property
    def num_weights(self) -> int:
        """Number of objects with a weight other than 1."""
        if not len(self.records.weights):
            return 0
        return int((~self.records.crowds & (self.records.weights != 1)).sum())

    @property
    def num_masks(self) -> int:
        """Number of objects with a mask."""
        return int((~self.records.crowds & (self.records.form != NO_MASK)).sum())
