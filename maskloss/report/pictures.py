"""Drawing of masks and boxes over images."""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maskloss.data.coco import ImageRecord
from maskloss.masks.encoded import EncodedMasks

Color = tuple[int, int, int]

_CROWD_COLOR = (150, 150, 150)
_GOLDEN_RATIO = 0.618034
#: Largest number of objects whose names are written in a picture.
_MOST_NAMED = 30


@dataclass(frozen=True)
class DrawnObject:
    """Object to draw.

    Attributes:
        mask: (h, w), 0 or 1, the part of the image that contains the mask.
        corner: x and y of this part's top left corner, in px.
        box: x1, y1, x2, y2 in px.
        text: text to write beside the box.
        color: RGB, each in 0 to 255.
        points: labeled points, x and y in px and 1 inside the object or 0 outside.
    """

    mask: npt.NDArray[np.uint8]
    corner: tuple[int, int]
    box: tuple[float, float, float, float]
    text: str
    color: Color
    points: tuple[tuple[float, float, float], ...] = ()

    def enlarged(self, factor: int) -> DrawnObject:
        """Return the same object for an image that is larger by an integer factor."""
        if factor == 1:
            return self
        x1, y1, x2, y2 = self.box
        mask = self.mask.repeat(factor, axis=0).repeat(factor, axis=1)
        corner = (self.corner[0] * factor, self.corner[1] * factor)
        box = (x1 * factor, y1 * factor, x2 * factor, y2 * factor)
        points = tuple((x * factor, y * factor, label) for x, y, label in self.points)
        return DrawnObject(mask, corner, box, self.text, self.color, points)


#: The part of a mask that is set, and x and y of its top left corner.
Cut = tuple[npt.NDArray[np.uint8], tuple[int, int]]

_NO_MASK = np.zeros((0, 0), dtype=np.uint8)


def cut_out(mask: npt.NDArray[np.uint8]) -> Cut:
    """Return the part of a mask (H, W) that is set, and x and y of its top left corner."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return _NO_MASK, (0, 0)
    top, left = int(rows[0]), int(columns[0])
    return mask[top : rows[-1] + 1, left : columns[-1] + 1], (left, top)


def cut_out_rle(rle: dict[str, Any]) -> Cut:
    """Return the part of an RLE's mask that is set, and x and y of its top left corner.

    Only this part is decoded, which is small in a large photograph.
    """
    counts = rle["counts"]
    as_bytes = {**rle, "counts": counts.encode("ascii") if isinstance(counts, str) else counts}
    return EncodedMasks.of_checked([as_bytes], *rle["size"]).runs(0).bitmap()


def cut_outs(masks: EncodedMasks | Tensor) -> Iterator[Cut]:
    """Yield the part of each mask that is set, and x and y of its top left corner.

    Encoded masks are decoded one by one and only around the object: thousands of whole ones do not fit into memory.
    """
    if not isinstance(masks, EncodedMasks):
        yield from map(cut_out, masks.numpy())
        return
    for index, (x1, y1, x2, y2) in enumerate(masks.extents().tolist()):
        if math.isnan(x1):
            yield _NO_MASK, (0, 0)
            continue
        left, top = max(math.floor(x1) - 1, 0), max(math.floor(y1) - 1, 0)
        width, height = min(math.ceil(x2) + 1, masks.width) - left, min(math.ceil(y2) + 1, masks.height) - top
        part, (x, y) = cut_out(masks[[index]].crop(top, left, height, width).bitmaps()[0].numpy())
        yield part, (x + left, y + top)


def category_color(category_id: int) -> Color:
    """Return the color of a category, the same in every picture and distinct for consecutive ids."""
    # An id may be too large for a float.
    red, green, blue = colorsys.hsv_to_rgb((category_id % 2**31 * _GOLDEN_RATIO) % 1.0, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_truth(
    image: Image.Image, record: ImageRecord, names: dict[int, str], *, enlarge: int = 1
) -> Image.Image:
    """Draw the annotations of an image over it: masks, boxes and labeled points, and in gray the boxes of crowds.

    Evaluation ignores crowds. Training leaves them out or ignores them, see `CocoDataset`.
    """
    crowds = [
        DrawnObject(_NO_MASK, (0, 0), a.box, "crowd", _CROWD_COLOR) for a in record.annotations if a.crowd
    ]
    objects = [
        DrawnObject(
            *cut,
            a.box,
            shortened(names[a.category_id]),
            category_color(a.category_id),
            tuple((x, y, label) for x, y, label in record.records.points_of(a.row).tolist() if label >= 0),
        )
        for a, cut in zip(record.objects, cut_outs(record.object_masks()), strict=True)
    ]
    return draw_objects(image, [*crowds, *objects], enlarge=enlarge)


def cut_out_results(results: Sequence[Mapping[str, Any]]) -> list[Cut | None]:
    """Return the part of each COCO result's mask that is set, or None for a result of a model without masks."""
    return [cut_out_rle(result["segmentation"]) if "segmentation" in result else None for result in results]


def draw_results(
    image: Image.Image,
    results: Sequence[Mapping[str, Any]],
    names: dict[int, str],
    *,
    enlarge: int = 1,
    cuts: Sequence[Cut | None] | None = None,
) -> Image.Image:
    """Draw COCO results over their image, with the highest score on top.

    Args:
        image: RGB image.
        results: COCO results of the image.
        names: name of each category.
        enlarge: see `draw_objects`.
        cuts: from `cut_out_results`, if it has been called already.
    """
    objects = []
    pairs = zip(results, cut_out_results(results) if cuts is None else cuts, strict=True)
    for result, cut in sorted(pairs, key=lambda pair: float(pair[0]["score"])):
        x, y, width, height = result["bbox"]
        objects.append(
            DrawnObject(
                *(cut or (_NO_MASK, (0, 0))),
                (x, y, x + width, y + height),
                f"{shortened(names[result['category_id']])} {result['score']:.2f}".strip(),
                category_color(result["category_id"]),
            )
        )
    return draw_objects(image, objects, enlarge=enlarge)


def draw_objects(image: Image.Image, objects: Sequence[DrawnObject], *, enlarge: int = 1) -> Image.Image:
    """Draw each object's tinted mask, its outline, its box, its text and its points, filled if they are inside it.

    Args:
        image: RGB image.
        objects: objects in drawing order.
        enlarge: integer factor to enlarge a small image by first, so that the text does not cover it.
    """
    if enlarge > 1:
        image = image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST)
    objects = [drawn.enlarged(enlarge) for drawn in objects]
    pixels = np.array(image.convert("RGB"))
    for drawn in objects:
        inside = drawn.mask.astype(bool)
        (left, top), (height, width) = drawn.corner, inside.shape
        # A view, which is changed in place.
        part = pixels[top : top + height, left : left + width]
        tinted = 0.55 * part[inside].astype(np.float32) + 0.45 * np.asarray(drawn.color, dtype=np.float32)
        part[inside] = tinted.round().astype(np.uint8)
        part[_outline(inside)] = drawn.color
    picture = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(picture)
    size = max(9, round(min(picture.size) / 30))
    font = ImageFont.load_default(size)
    for drawn in objects:
        canvas.rectangle(drawn.box, outline=drawn.color, width=max(1, size // 10))
        _write(canvas, drawn, font, picture.size)
    radius = max(2, size // 4)
    for drawn in objects:
        for x, y, label in drawn.points:
            fill, outline = (drawn.color, "black") if label else ("white", drawn.color)
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=outline)
    return picture


def names_for(names: Mapping[int, str], count: int) -> dict[int, str]:
    """Return the names of the categories for a picture of `count` objects: empty if they would cover many objects."""
    return dict(names) if count <= _MOST_NAMED else dict.fromkeys(names, "")


def spread(images: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """Return evenly spread images with objects, the same ones in every report of a data set."""
    shown = [image for image in images if image.annotations] or list(images)
    step = max(len(shown) / count, 1)
    return [shown[int(i * step)] for i in range(min(count, len(shown)))]


def shortened(name: str) -> str:
    """Return a name shortened to at most 40 characters, with characters that cannot be encoded escaped."""
    shown = name if len(name) <= 40 else f"{name[:37]}..."
    return shown.encode(errors="backslashreplace").decode()


def jpeg(image: Image.Image, longest: int) -> bytes:
    """Encode an image as JPEG, shrunk to at most `longest` px on its longer side."""
    shrunk = image.copy()
    shrunk.thumbnail((longest, longest))
    buffer = io.BytesIO()
    shrunk.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    """Encode an image as PNG.

    Photographs of 12 MP are encoded in a quarter of the time of Pillow's default level, with 15 % more bytes.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=2)
    return buffer.getvalue()


def _outline(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the pixels of a mask that have a neighbor outside it."""
    framed = np.pad(mask, 1)
    inner = framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
    return mask & ~inner


def _write(canvas: ImageDraw.ImageDraw, drawn: DrawnObject, font: Any, size: tuple[int, int]) -> None:
    """Write an object's text on a background of its color, above the box or, if there is no room, inside it."""
    left, top, right, bottom = canvas.textbbox((0, 0), drawn.text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(drawn.box[0], 0), max(size[0] - width, 0))
    y = drawn.box[1] - height if drawn.box[1] >= height else drawn.box[1]
    canvas.rectangle((x, y, x + width, y + height), fill=drawn.color)
    luminance = 0.299 * drawn.color[0] + 0.587 * drawn.color[1] + 0.114 * drawn.color[2]
    canvas.text(
        (x + 2 - left, y + 2 - top), drawn.text, fill="black" if luminance > 110 else "white", font=font
    )
