"""EncodedMasks: instance masks as COCO polygons and RLEs, resized, flipped and cropped without rasterizing them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from maskloss.masks.coco_format import rasterize_polygons

#: Largest coordinate in px: beyond it, float64 is too coarse for fractions of a pixel.
_FARTHEST = 1e10

#: Most characters of compressed RLEs that are decoded at once.
_CHUNK = 50_000
#: Smallest number that one, two, ... characters of compressed run lengths cannot hold: five bits each, with a sign.
_TOO_LARGE = np.int64(1) << np.arange(4, 64, 5, dtype=np.int64)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Runs:
    """A mask as vertical runs of set pixels, each within one column.

    Attributes:
        column: (R,) column of each run.
        top: (R,) first row of each run.
        bottom: (R,) last row of each run, plus 1.

    Example:
        >>> EncodedMasks([{"size": [2, 2], "counts": [1, 1, 2]}], height=2, width=2).runs(0)
        Runs(column=array([0]), top=array([1]), bottom=array([2]))
    """

    column: IntArray
    top: IntArray
    bottom: IntArray

    def bitmap(self) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
        """Return the part of the mask that is set, as 0 and 1, and x and y of its top left corner in px."""
        if len(self.column) == 0:
            return np.zeros((0, 0), dtype=np.uint8), (0, 0)
        left, top = int(self.column.min()), int(self.top.min())
        changes = np.zeros(
            (int(self.bottom.max()) - top + 1, int(self.column.max()) + 1 - left), dtype=np.int8
        )
        np.add.at(changes, (self.top - top, self.column - left), 1)
        np.add.at(changes, (self.bottom - top, self.column - left), -1)
        return changes[:-1].cumsum(axis=0, dtype=np.int8).view(np.uint8), (left, top)


@dataclass(frozen=True)
class AxisMap:
    """The map x -> scale * x + shift along one axis, from the annotated image's px to the current image's px.

    Example:
        >>> AxisMap().then(2.0, 0.0).then(1.0, -3.0)
        AxisMap(scale=2.0, shift=-3.0)
    """

    scale: float = 1.0
    shift: float = 0.0

    def then(self, scale: float, shift: float) -> AxisMap:
        """Return this map followed by a second map, x -> scale * x + shift."""
        return AxisMap(self.scale * scale, self.shift * scale + shift)

    def inverse(self, positions: Any) -> Any:
        """Map positions in the current image back to the annotated image's px."""
        return (positions - self.shift) / self.scale


class EncodedMasks:
    """Instance masks as COCO polygons and RLEs, used instead of a `(G, H, W)` tensor of bitmaps.

    `resize`, `translate`, `crop` and the two flips only compose two axis maps. They are cheap and lossless: polygons
    stay exact, and an RLE keeps its own resolution. Use it as `target["masks"]`; `maskloss.mask_targets` reads it.
    Immutable. Code that moves every value of a target to a device can call `to`, which returns the object itself.

    Args:
        segmentations: one per instance: a list of polygons `[x0, y0, x1, y1, ...]` in px (the instance is their
            union), an RLE `{"size": [H, W], "counts": str, bytes or list of int}`, or None for an instance without
            a mask, which has no mask targets.
        height: H, in px.
        width: W, in px.

    Attributes:
        height: H of the current image.
        width: W of the current image.
        source_size: (H, W) of the annotated image.
        x_map: from x in the annotated image to x in the current image.
        y_map: from y in the annotated image to y in the current image.
        cut: whether a part of the image has been cropped or moved out of it.

    Raises:
        TypeError: the segmentations are not a list, or height or width is not an integer.
        ValueError: a segmentation is empty; a polygon has an odd number of coordinates, fewer than three points, or
            a coordinate that is not finite or beyond 1e10 px; or an RLE has another size or does not decode. The
            message names the instance.

    Example:
        >>> masks = EncodedMasks([[[1, 1, 3, 1, 3, 3, 1, 3]]], height=4, width=4)
        >>> masks.resize(8, 8).horizontal_flip().extents()
        tensor([[2., 2., 6., 6.]], dtype=torch.float64)
    """

    def __init__(self, segmentations: Sequence[Any], height: int, width: int) -> None:
        height, width = _checked_size(height, width)
        if isinstance(segmentations, dict | str | bytes | Tensor) or not isinstance(segmentations, Iterable):
            bitmaps = "; bitmaps (G, H, W) need no EncodedMasks" if isinstance(segmentations, Tensor) else ""
            raise TypeError(
                "segmentations must be a list with the segmentation of each instance, not a "
                f"{type(segmentations).__name__}{bitmaps}"
            )
        self.segmentations = tuple(
            _checked(segmentation, height, width, f"instance {index}")
            for index, segmentation in enumerate(segmentations)
        )
        self.height, self.width = self.source_size = height, width
        self.x_map, self.y_map = AxisMap(), AxisMap()
        self.cut = False

    @classmethod
    def of_checked(cls, segmentations: Sequence[Any], height: int, width: int) -> EncodedMasks:
        """Build from segmentations that `checked_polygon` and `checked_rle` have already validated.

        Args:
            segmentations: one per instance: a list of polygons, an RLE returned by `checked_rle`, or None.
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
        """The shape (G, H, W) of the equivalent tensor of bitmaps."""
        return len(self), self.height, self.width

    def to(self, *args: Any, **kwargs: Any) -> EncodedMasks:
        """Return the object itself: encoded masks have no device."""
        return self

    def __getitem__(self, index: Any) -> EncodedMasks:
        """Select instances by a slice, a sequence of indices, or a bool or int64 tensor."""
        if isinstance(index, Tensor):
            index = index.cpu()
        keep = torch.arange(len(self), device="cpu")[index].reshape(-1).tolist()
        return self._with(segmentations=tuple(self.segmentations[i] for i in keep))

    def resize(self, height: int, width: int) -> EncodedMasks:
        """Return the masks scaled to another image size, in px."""
        height, width = _checked_size(height, width)
        return self._with(
            height=height,
            width=width,
            x_map=self.x_map.then(width / self.width, 0.0),
            y_map=self.y_map.then(height / self.height, 0.0),
        )

    def horizontal_flip(self) -> EncodedMasks:
        """Return the masks with left and right mirrored."""
        return self._with(x_map=self.x_map.then(-1.0, self.width))

    def vertical_flip(self) -> EncodedMasks:
        """Return the masks with top and bottom mirrored."""
        return self._with(y_map=self.y_map.then(-1.0, self.height))

    def translate(self, y: float, x: float) -> EncodedMasks:
        """Return the masks moved down by y px and right by x px, also by fractions; the image size stays."""
        return self._with(
            x_map=self.x_map.then(1.0, x),
            y_map=self.y_map.then(1.0, y),
            cut=self.cut or (y, x) != (0, 0),
        )

    def crop(self, top: int, left: int, height: int, width: int) -> EncodedMasks:
        """Return the masks cropped to a window, in px; a window that extends beyond the image pads it.

        Parts of the masks outside the window are kept, so use only boxes inside the window to read them.

        Raises:
            ValueError: the window pads after an earlier crop or translation, whose removed parts would reappear; or it
                has no pixels.
        """
        height, width = _checked_size(height, width)
        bottom, right = top + height, left + width
        if self.cut and (top < 0 or left < 0 or bottom > self.height or right > self.width):
            raise ValueError("encoded masks that were cropped or moved cannot be padded; use `bitmaps()`")
        return self._with(
            height=height,
            width=width,
            x_map=self.x_map.then(1.0, -left),
            y_map=self.y_map.then(1.0, -top),
            cut=self.cut or top > 0 or left > 0 or bottom < self.height or right < self.width,
        )

    def is_rle(self, index: int) -> bool:
        """Return whether an instance is an RLE (read it with `runs`) rather than polygons (`polygons`)."""
        return isinstance(self.segmentations[index], dict)

    def has_mask(self, index: int) -> bool:
        """Return whether an instance has a mask, not only a box."""
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
        """Return one instance's RLE as runs in the annotated image."""
        segmentation = self.segmentations[index]
        height = segmentation["size"][0]
        ends = decode_counts(segmentation["counts"]).cumsum()
        # Runs alternate between zeros and ones, starting with zeros; the last may be of zeros.
        start, stop = ends[: len(ends) // 2 * 2 : 2], ends[1::2]
        start, stop = start[stop > start], stop[stop > start]
        # Split runs that continue at the top of the next column.
        first, last = start // height, (stop - 1) // height
        run, piece = expanded(last - first + 1)
        column = first[run] + piece
        top = np.where(column == first[run], start[run] % height, 0)
        bottom = np.where(column == last[run], (stop[run] - 1) % height + 1, height)
        return Runs(column, top, bottom)

    def extents(self) -> Tensor:
        """Return the tight box of each instance, clipped to the image.

        Returns:
            (G, 4) float64, xyxy in px of the current image; NaN for an instance without a mask or outside the image.
        """
        boxes = torch.full((len(self), 4), torch.nan, dtype=torch.float64, device="cpu")
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
        """Rasterize to (G, H, W) uint8: polygons with pycocotools, RLEs by nearest pixel, no mask as zeros.

        Meant for visualization and comparison; the losses never use it.
        """
        masks = torch.zeros(self.shape, dtype=torch.uint8, device="cpu")
        for index in range(len(self)):
            if not self.has_mask(index):
                continue
            if not self.is_rle(index):
                mask = rasterize_polygons(self.polygons(index), self.height, self.width)
                masks[index] = torch.from_numpy(mask)
                continue
            part, (left, top) = self.runs(index).bitmap()
            # A border of zeros, for pixels outside the part that is set.
            framed = F.pad(torch.from_numpy(part), (1, 1, 1, 1))
            rows = _nearest(self.y_map, self.height, top, part.shape[0])
            columns = _nearest(self.x_map, self.width, left, part.shape[1])
            masks[index] = framed[rows + 1][:, columns + 1]
        return masks

    def _with(self, **changes: Any) -> EncodedMasks:
        other = object.__new__(EncodedMasks)
        other.__dict__.update(self.__dict__, **changes)
        return other


def _nearest(axis: AxisMap, size: int, start: int, source_size: int) -> Tensor:
    """Return the source pixel from `start` on that contains each pixel's center, clamped to [-1, source_size]."""
    centers = axis.inverse(torch.arange(size, dtype=torch.float64, device="cpu") + 0.5)
    pixels: Tensor = centers.floor().long() - start
    return pixels.clamp(-1, source_size)


def _checked_size(height: Any, width: Any) -> tuple[int, int]:
    """Return a size in px as integers; raise TypeError or ValueError if it is none."""
    try:
        whole = int(height), int(width)
        is_whole = whole == (height, width)
    except (TypeError, ValueError, OverflowError):
        is_whole = False
    if not is_whole or isinstance(height, str) or isinstance(width, str):
        raise TypeError(f"height and width must be integers, got {height!r} and {width!r}")
    if min(whole) <= 0:
        raise ValueError(f"height and width must be positive, got {height} x {width}")
    return whole


def _checked(segmentation: Any, height: int, width: int, name: str) -> Any:
    """Validate a segmentation and return a tuple of (V, 2) polygons, a compressed RLE or None; raise ValueError."""
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
    if all(_is_real(value) for value in segmentation):
        raise ValueError(
            f"{name}: a segmentation is a list of polygons, not a flat list of numbers; write [[x0, y0, x1, y1, ...]]"
        )
    return tuple(checked_polygon(polygon, name) for polygon in segmentation)


def checked_polygon(polygon: Any, name: str) -> FloatArray:
    """Validate a polygon and return its points, (V, 2) xy.

    Args:
        polygon: flat list or array of coordinates x0, y0, x1, y1, ... in px.
        name: how error messages name the instance.

    Raises:
        ValueError: no flat list of numbers, an odd number of coordinates, fewer than three points, or a coordinate
            that is not finite or beyond 1e10 px.

    Example:
        >>> checked_polygon([0, 0, 2, 0, 2, 1], "instance 0").tolist()
        [[0.0, 0.0], [2.0, 0.0], [2.0, 1.0]]
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
    """Return whether a value is a number; numpy would also convert "3" and True."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def checked_rle(rle: dict[str, Any], height: int, width: int, name: str) -> dict[str, Any]:
    """Validate an RLE and return it compressed, as pycocotools expects it.

    pycocotools reads past its buffers if the runs do not sum to H * W, so this is checked first.

    Args:
        rle: `{"size": [H, W], "counts": str, bytes or list of int}`.
        height: H, in px.
        width: W, in px.
        name: how error messages name the instance.

    Raises:
        ValueError: keys are missing, the size differs from (H, W), or the counts are corrupt.

    Example:
        >>> checked_rle({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3, "instance 0")
        {'size': [2, 3], 'counts': b'123'}
    """
    if "size" not in rle or "counts" not in rle:
        raise ValueError(f"{name}: an RLE needs the keys size and counts, got {sorted(map(str, rle))}")
    size, counts = rle["size"], rle["counts"]
    if not isinstance(size, list | tuple | np.ndarray) or list(size) != [height, width]:
        raise ValueError(f"{name}: the RLE's size is {size}, the image's is [{height}, {width}]")
    try:
        if isinstance(counts, str | bytes):
            runs = decode_counts(counts.encode("ascii") if isinstance(counts, str) else counts)
        else:
            runs = _whole_runs(counts)
        if (runs < 0).any():
            raise ValueError("a run length is negative")
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name}: the RLE's counts are corrupt: {error}") from None
    # Python's integers, because a sum of int64 may overflow.
    covered = sum(runs.tolist()) if runs.max(initial=0) > height * width else int(runs.sum())
    if covered != height * width:
        raise ValueError(
            f"{name}: the RLE's counts are corrupt: they cover {covered} pixels of {height * width}"
        )
    # Compressed input is encoded again: decoders disagree on numbers that are not in the shortest form.
    return {"size": [height, width], "counts": encode_counts(runs)}


def _whole_runs(counts: Any) -> IntArray:
    """Return the run lengths of an uncompressed RLE; raise ValueError, TypeError or OverflowError for other values."""
    whole = list(counts)
    if not set(map(type, whole)) <= {int}:  # this test is faster than converting and comparing each value
        whole = [int(run) for run in counts]
        if any(run != value for run, value in zip(whole, counts, strict=True)):
            raise ValueError("a run length is not an integer")
    try:
        return np.array(whole, dtype=np.int64)
    except OverflowError:
        raise ValueError("a run length has more than 64 bits") from None


def decode_counts(compressed: bytes) -> IntArray:
    """Decode COCO's compressed run lengths.

    Each number is a little-endian sequence of characters, offset by "0", with five bits each. Bit 5 is set if more
    characters follow; bit 4 of the last character is the sign. From the fourth run on, the number is the difference
    to the run two places before.

    Raises:
        ValueError: a character outside the code, an incomplete last number, or a number of more than 12 characters.

    Example:
        >>> decode_counts(b"123").tolist()
        [1, 2, 3]

    Source: the format of pycocotools' `rleToString`.
    """
    codes = np.frombuffer(compressed, dtype=np.uint8).astype(np.int64) - 48
    if not len(codes):
        return codes
    outside = np.nonzero((codes < 0) | (codes >= 64))[0]
    if len(outside):
        raise ValueError(f"the character {chr(compressed[outside[0]])!r} is not allowed in compressed counts")
    last = np.nonzero((codes & 32) == 0)[0]
    if not len(last) or last[-1] != len(codes) - 1:
        raise ValueError("the last number is incomplete")
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > 12:
        raise ValueError("a number has more than 12 characters")
    _, place = expanded(lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), first)
    runs -= np.where(codes[last] & 16, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def encode_counts(runs: IntArray) -> bytes:
    """Compress run lengths, the inverse of `decode_counts`, in the shortest form.

    pycocotools writes past its buffer if the runs take six characters on average, from images of 50 million px on.

    Example:
        >>> encode_counts(np.array([1, 2, 3]))
        b'123'
    """
    values = runs.copy()
    values[3:] -= runs[1:-2]
    magnitude = np.where(values < 0, ~values, values)
    digits = 1 + np.searchsorted(_TOO_LARGE, magnitude, side="right")
    index, place = expanded(digits)
    codes = (values[index] >> (5 * place)) & 31
    codes[place < digits[index] - 1] |= 32
    return (codes + 48).astype(np.uint8).tobytes()


def are_canonical(compressed: Sequence[bytes], pixels: IntArray) -> BoolArray:
    """Return which RLEs are compressed as pycocotools does it, and cover exactly their pixels: (N,).

    `checked_rle` accepts these unchanged, and tells what is wrong with the others. Decoding many at once is several
    times as fast.

    Args:
        compressed: N compressed run lengths.
        pixels: (N,) H * W of each, below 2**31.

    Example:
        >>> are_canonical([b"123", b"124", b"12~"], np.array([6, 6, 6])).tolist()
        [True, False, False]
    """
    result = np.zeros(len(compressed), dtype=bool)
    lengths = np.fromiter(map(len, compressed), dtype=np.int64, count=len(compressed))
    ends = lengths.cumsum()
    start = 0
    while start < len(compressed):
        stop = max(int(np.searchsorted(ends, ends[start] - lengths[start] + _CHUNK)), start + 1)
        codes = np.frombuffer(b"".join(compressed[start:stop]), dtype=np.uint8) - 48  # wraps below 48
        # The numbers of an RLE end with it if its last character says so; no other RLE is decoded.
        last = ends[start:stop] - (ends[start] - lengths[start]) - 1
        whole = lengths[start:stop] > 0
        whole[whole] = codes[last[whole]] & 32 == 0
        outside = np.searchsorted(last, np.nonzero(codes >= 64)[0])
        whole[outside] = False
        kept = np.nonzero(whole)[0]
        if len(kept) < stop - start:
            codes = codes[np.repeat(whole, lengths[start:stop])]
        if len(kept):
            result[start + kept] = _are_canonical(codes, lengths[start + kept], pixels[start + kept])
        start = stop
    return result


def _are_canonical(codes: npt.NDArray[np.uint8], lengths: IntArray, pixels: IntArray) -> BoolArray:
    """Return `are_canonical` of RLEs whose characters are all in the code, and which end with a whole number.

    Args:
        codes: (K,) characters minus 48, of all RLEs together.
        lengths: (N,) number of characters of each RLE, at least 1.
        pixels: (N,) H * W.
    """
    last = np.nonzero(codes & 32 == 0)[0]
    first = np.concatenate([[0], last[:-1] + 1])
    digits = last - first + 1
    top = codes[last]
    # The highest five bits are superfluous if they only repeat the sign, which is bit 4 of the five bits below.
    below = codes[np.maximum(last - 1, 0)] & 16
    longer = (digits > 1) & (((top == 0) & (below == 0)) | ((top == 31) & (below != 0)))
    # Runs have up to 31 bits, and their differences 32: seven characters.
    wrong = longer | (digits > 7)
    _, place = expanded(digits)
    values = np.add.reduceat((codes & 31).astype(np.int64) << (5 * np.minimum(place, 7)), first)
    values -= np.where(top & 16, np.int64(1) << (5 * np.minimum(digits, 8)), 0)
    values[wrong] = 0
    # Numbers from the fourth run on are differences to the run two places before.
    head = np.searchsorted(last, lengths.cumsum() - lengths)  # (N,) index of the first number of each RLE
    owner, index = expanded(np.diff(head, append=len(last)))
    runs = values.copy()
    for chosen, beginning in ((index % 2 == 1, 1), ((index % 2 == 0) & (index >= 2), 2)):
        sums = values[chosen].cumsum()
        before = sums - values[chosen]
        heads = np.nonzero(index[chosen] == beginning)[0]
        counts = np.diff(heads, append=len(sums))
        runs[chosen] = sums - np.repeat(before[heads], counts)
    wrong |= (runs < 0) | (runs >= 2**31)
    runs[wrong] = 0
    is_wrong = np.bincount(owner, wrong, len(lengths)) > 0
    covered = np.add.reduceat(runs, head)
    canonical: BoolArray = ~is_wrong & (covered == pixels)
    return canonical


def expanded(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Repeat each index `counts[index]` times, and number the repetitions of each.

    Returns:
        (K,) the repeated indices; (K,) the number of each repetition, from 0.

    Example:
        >>> [values.tolist() for values in expanded(np.array([2, 0, 3]))]
        [[0, 0, 2, 2, 2], [0, 1, 0, 1, 2]]
    """
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - (counts.cumsum() - counts)[index]


def polygon_area(polygon: FloatArray) -> float:
    """Return the area in px² of one polygon (V, 2), by the shoelace formula.

    Example:
        >>> polygon_area(np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 1.0]]))
        1.0
    """
    x, y = polygon[:, 0], polygon[:, 1]
    return abs(math.fsum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
