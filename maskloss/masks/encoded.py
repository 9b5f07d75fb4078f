"""EncodedMasks: instance masks as COCO stores them, resized, flipped and cropped without a pixel."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from maskloss.masks.coco_format import rasterize_polygons

#: Beyond this many px, float64 has no fractions of a pixel left that would count.
_FARTHEST = 1e10

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Runs:
    """A mask as runs of pixels down its columns.

    Attributes:
        column: (R,) of each run.
        top: (R,) its first row.
        bottom: (R,) its last row + 1.
    """

    column: IntArray
    top: IntArray
    bottom: IntArray


@dataclass(frozen=True)
class AxisMap:
    """The map x -> scale * x + shift of one axis, from the annotation's pixels to the current image's."""

    scale: float = 1.0
    shift: float = 0.0

    def then(self, scale: float, shift: float) -> AxisMap:
        """Compose with a second map, x -> scale * x + shift, applied after this one."""
        return AxisMap(self.scale * scale, self.shift * scale + shift)

    def inverse(self, positions: Any) -> Any:
        """Map positions of the current image back to the annotation's pixels."""
        return (positions - self.shift) / self.scale


class EncodedMasks:
    """Instance masks as COCO polygons and RLEs, in the place of a `(G, H, W)` tensor of bitmaps.

    `resize`, `translate`, `crop` and the two flips only compose two axis maps, so they cost nothing and lose
    nothing: polygons stay exact, and an RLE keeps its own resolution. Stands in `target["masks"]`, and
    `maskloss.mask_targets` reads it. Immutable; `to` is there so that a loop that moves every value of a
    target to a device needs no exception for it.

    Args:
        segmentations: one per instance: a list of polygons `[x0, y0, x1, y1, ...]` in px (their union is the
            instance), an RLE `{"size": [H, W], "counts": str, bytes or list of int}`, or None for an instance without
            a mask, which has no mask targets.
        height: H, in px.
        width: W, in px.

    Attributes:
        height: H of the image as it is now.
        width: W of the image as it is now.
        source_size: (H, W) of the image as it was annotated.
        x_map: from the annotation's x to the current image's.
        y_map: from the annotation's y to the current image's.
        cut: whether a crop left a part of the image out.

    Raises:
        ValueError: a segmentation is empty, a polygon has an odd number of coordinates, fewer than three
            points, or one that is not finite or beyond 1e10 px, or an RLE is not of this size or does not decode.
            The message names the instance.
    """

    def __init__(self, segmentations: Sequence[Any], height: int, width: int) -> None:
        if height <= 0 or width <= 0:
            raise ValueError(f"height and width must be positive, got {height} x {width}")
        self.segmentations = tuple(
            _checked(segmentation, height, width, f"instance {index}")
            for index, segmentation in enumerate(segmentations)
        )
        self.height, self.width = self.source_size = height, width
        self.x_map, self.y_map = AxisMap(), AxisMap()
        self.cut = False

    @classmethod
    def of_checked(cls, segmentations: Sequence[Any], height: int, width: int) -> EncodedMasks:
        """Make masks of segmentations that `checked_polygon` and `checked_rle` have passed, without again.

        Args:
            segmentations: one per instance: a list of polygons, an RLE that `checked_rle` gave, or None.
            height: H, in px.
            width: W, in px.
        """
        masks = cls([], height, width)
        return masks._with(
            segmentations=tuple(
                segmentation
                if segmentation is None or isinstance(segmentation, dict)
                else tuple(np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation)
                for segmentation in segmentations
            )
        )

    def __len__(self) -> int:
        return len(self.segmentations)

    def __repr__(self) -> str:
        return f"EncodedMasks({len(self)} instances, height={self.height}, width={self.width})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, H, W), as the tensor of bitmaps would have it."""
        return len(self), self.height, self.width

    def to(self, *args: Any, **kwargs: Any) -> EncodedMasks:
        """Return itself: there is no device to move to."""
        return self

    def __getitem__(self, index: Any) -> EncodedMasks:
        """Select instances by a slice, a sequence of indices, or a bool or int64 tensor."""
        keep = (
            torch.arange(len(self))[index.cpu() if isinstance(index, Tensor) else index].reshape(-1).tolist()
        )
        return self._with(segmentations=tuple(self.segmentations[i] for i in keep))

    def resize(self, height: int, width: int) -> EncodedMasks:
        """Scale to another image size, in px."""
        return self._with(
            height=height,
            width=width,
            x_map=self.x_map.then(width / self.width, 0.0),
            y_map=self.y_map.then(height / self.height, 0.0),
        )

    def horizontal_flip(self) -> EncodedMasks:
        """Mirror left and right."""
        return self._with(x_map=self.x_map.then(-1.0, self.width))

    def vertical_flip(self) -> EncodedMasks:
        """Mirror top and bottom."""
        return self._with(y_map=self.y_map.then(-1.0, self.height))

    def translate(self, y: float, x: float) -> EncodedMasks:
        """Move down and to the right, in px and parts of them, behind the same window."""
        return self._with(x_map=self.x_map.then(1.0, x), y_map=self.y_map.then(1.0, y))

    def crop(self, top: int, left: int, height: int, width: int) -> EncodedMasks:
        """Cut out a window, in px; where it reaches beyond the image, it pads it.

        Masks are to be read by boxes inside the window.

        Raises:
            ValueError: padding after an earlier crop, since what was cut off there would be back.
        """
        bottom, right = top + height, left + width
        if self.cut and (top < 0 or left < 0 or bottom > self.height or right > self.width):
            raise ValueError("encoded masks that were cropped cannot be padded; use `bitmaps()`")
        return self._with(
            height=height,
            width=width,
            x_map=self.x_map.then(1.0, -left),
            y_map=self.y_map.then(1.0, -top),
            cut=self.cut or top > 0 or left > 0 or bottom < self.height or right < self.width,
        )

    def is_rle(self, index: int) -> bool:
        """Whether an instance is an RLE, which `runs` reads, or polygons, which `polygons` reads."""
        return isinstance(self.segmentations[index], dict)

    def has_mask(self, index: int) -> bool:
        """Whether an instance has a mask, or a box only."""
        return self.segmentations[index] is not None

    def polygons(self, index: int) -> list[FloatArray]:
        """Return one instance's polygons as (V, 2) xy in the current image's px.

        Raises:
            ValueError: the instance has no mask.
        """
        if not self.has_mask(index):
            raise ValueError(f"instance {index} has no mask")
        scale = np.array([self.x_map.scale, self.y_map.scale])
        shift = np.array([self.x_map.shift, self.y_map.shift])
        return [polygon * scale + shift for polygon in self.segmentations[index]]

    def runs(self, index: int) -> Runs:
        """Give one instance's RLE as runs of the image as it was annotated."""
        segmentation = self.segmentations[index]
        height = segmentation["size"][0]
        ends = decode_counts(segmentation["counts"]).cumsum()
        # Every second run is of ones; the last may be of zeros.
        start, stop = ends[: len(ends) // 2 * 2 : 2], ends[1::2]
        start, stop = start[stop > start], stop[stop > start]
        # A run that goes on at the top of the next column is cut there.
        first, last = start // height, (stop - 1) // height
        run, piece = expanded(last - first + 1)
        column = first[run] + piece
        top = np.where(column == first[run], start[run] % height, 0)
        bottom = np.where(column == last[run], (stop[run] - 1) % height + 1, height)
        return Runs(column, top, bottom)

    def extents(self) -> Tensor:
        """Return the tight box of each instance, cut at the image's border.

        Returns:
            (G, 4) float64, xyxy in px of the current image; NaN for an instance of which nothing is inside.
        """
        boxes = torch.full((len(self), 4), torch.nan, dtype=torch.float64)
        limit = np.array([self.width, self.height], dtype=np.float64)
        for index, segmentation in enumerate(self.segmentations):
            if segmentation is None:
                continue
            if self.is_rle(index):
                runs = self.runs(index)
                x = np.array([runs.column.min(), runs.column.max() + 1]) if len(runs.column) else np.empty(0)
                y = np.array([runs.top.min(), runs.bottom.max()]) if len(runs.column) else np.empty(0)
                points = np.stack(
                    [x * self.x_map.scale + self.x_map.shift, y * self.y_map.scale + self.y_map.shift], 1
                )
            else:
                points = np.concatenate(self.polygons(index))
            if not len(points):
                continue
            low, high = points.min(axis=0).clip(min=0), np.minimum(points.max(axis=0), limit)
            if (high > low).all():
                boxes[index] = torch.from_numpy(np.concatenate([low, high]))
        return boxes

    def bitmaps(self) -> Tensor:
        """Rasterize to (G, H, W) uint8 with pycocotools, an RLE by its nearest pixel; no mask gives zeros.

        For looking at and for comparing with; the losses never need it.
        """
        masks = torch.zeros(self.shape, dtype=torch.uint8)
        for index in range(len(self)):
            if not self.has_mask(index):
                continue
            if not self.is_rle(index):
                mask = rasterize_polygons(self.polygons(index), self.height, self.width)
                masks[index] = torch.from_numpy(mask)
                continue
            bitmap = torch.from_numpy(coco_mask.decode(self.segmentations[index]))
            # A frame of zeros, for what lies beside the image that was annotated.
            framed = F.pad(bitmap, (1, 1, 1, 1))
            rows = _nearest(self.y_map, self.height, bitmap.shape[0])
            columns = _nearest(self.x_map, self.width, bitmap.shape[1])
            masks[index] = framed[rows + 1][:, columns + 1]
        return masks

    def _with(self, **changes: Any) -> EncodedMasks:
        other = object.__new__(EncodedMasks)
        other.__dict__.update(self.__dict__, **changes)
        return other


def _nearest(axis: AxisMap, size: int, source_size: int) -> Tensor:
    """The annotation's pixel that each pixel's centre lies in; -1 before the first, source_size after the last."""
    centres = axis.inverse(torch.arange(size, dtype=torch.float64) + 0.5)
    pixels: Tensor = centres.floor().long()
    return pixels.clamp(-1, source_size)


def _checked(segmentation: Any, height: int, width: int, name: str) -> Any:
    """Return polygons as a tuple of (V, 2) arrays, an RLE that pycocotools decodes, or None; or raise ValueError."""
    if segmentation is None:
        return None
    if isinstance(segmentation, dict):
        return checked_rle(segmentation, height, width, name)
    if not isinstance(segmentation, list | tuple):
        raise ValueError(
            f"{name}: a segmentation is a list of polygons or an RLE, not {type(segmentation).__name__}"
        )
    if not segmentation:
        raise ValueError(f"{name}: the segmentation has no polygon")
    return tuple(checked_polygon(polygon, name) for polygon in segmentation)


def checked_polygon(polygon: Any, name: str) -> FloatArray:
    """Give a polygon's points, (V, 2) xy.

    Raises:
        ValueError: an odd number of coordinates, fewer than three points, or a value that is not finite.
    """
    try:
        if isinstance(polygon, list | tuple) and not all(_is_real(value) for value in polygon):
            raise TypeError
        coordinates = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        coordinates = np.empty((0, 0))
    if coordinates.ndim != 1:
        raise ValueError(f"{name}: a polygon is a flat list of numbers x0, y0, x1, y1, ...")
    if len(coordinates) % 2:
        raise ValueError(f"{name}: a polygon has an odd number of coordinates ({len(coordinates)})")
    if len(coordinates) < 6:
        raise ValueError(f"{name}: a polygon has {len(coordinates) // 2} points, fewer than 3")
    if not np.isfinite(coordinates).all():
        raise ValueError(f"{name}: a polygon has a coordinate that is not finite")
    if (farthest := np.abs(coordinates).max()) > _FARTHEST:
        raise ValueError(f"{name}: a polygon has a coordinate of {farthest:g} px, more than {_FARTHEST:g}")
    return coordinates.reshape(-1, 2)


def _is_real(value: Any) -> bool:
    """Whether a value is a number, which numpy would also make of "3" and True."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def checked_rle(rle: dict[str, Any], height: int, width: int, name: str) -> dict[str, Any]:
    """Give the RLE compressed, as pycocotools takes it.

    pycocotools reads past its buffers where the runs do not add up, so they are added up here first.

    Raises:
        ValueError: keys are missing, the size is another, or the counts are corrupt.
    """
    if "size" not in rle or "counts" not in rle:
        raise ValueError(f"{name}: an RLE needs the keys size and counts, got {sorted(map(str, rle))}")
    size, counts = rle["size"], rle["counts"]
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise ValueError(f"{name}: the RLE's size is {size}, the image's is [{height}, {width}]")
    try:
        if isinstance(counts, str | bytes):
            runs = decode_counts(counts.encode("ascii") if isinstance(counts, str) else counts).tolist()
        else:
            runs = [int(run) for run in counts]
            if any(run != value for run, value in zip(runs, counts, strict=True)):
                raise ValueError("a run that is not whole")
        if any(run < 0 for run in runs):
            raise ValueError("a negative run")
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name}: the RLE's counts are corrupt: {error}") from None
    if sum(runs) != height * width:
        raise ValueError(
            f"{name}: the RLE's counts are corrupt: they cover {sum(runs)} pixels of {height * width}"
        )
    # Encoded anew also where it came compressed: one spelling of a number is not read alike by all decoders.
    encoded: dict[str, Any] = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return encoded


def decode_counts(compressed: bytes) -> IntArray:
    """Decode COCO's compressed run lengths.

    Each number is a little-endian sequence of characters from "0", five bits each, bit 5 set where more
    follow, sign in the last one's bit 4; from the fourth run on, the difference to the run before last.

    Raises:
        ValueError: a character outside the code, an unfinished number, or one beyond 2**59.

    Source: the format of pycocotools' `rleToString`.
    """
    codes = np.frombuffer(compressed, dtype=np.uint8).astype(np.int64) - 48
    if not len(codes):
        return codes
    outside = np.nonzero((codes < 0) | (codes >= 64))[0]
    if len(outside):
        raise ValueError(f"the character {chr(compressed[outside[0]])!r} is not of the code")
    last = np.nonzero((codes & 32) == 0)[0]
    if not len(last) or last[-1] != len(codes) - 1:
        raise ValueError("the last number is unfinished")
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > 12:
        raise ValueError("a number of more than 12 characters")
    _, place = expanded(lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), first)
    runs -= np.where(codes[last] & 16, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def expanded(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Repeat each index as often as its count; give the indices, and the number of each among its equals."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - (counts.cumsum() - counts)[index]


def polygon_area(polygon: FloatArray) -> float:
    """Area in px² of one polygon (V, 2), by the shoelace formula."""
    x, y = polygon[:, 0], polygon[:, 1]
    return abs(math.fsum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
