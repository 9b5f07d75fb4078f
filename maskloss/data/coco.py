"""Reading COCO-format annotation files, and finding what is wrong with them.

One pass reads and checks. `read_coco` refuses a file with an error and names the first one;
`find_problems` lists all of them, as `maskloss check` prints them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from maskloss.errors import InputError
from maskloss.files import existing_folder, read_bytes
from maskloss.masks.encoded import EncodedMasks, checked_polygon, checked_rle, polygon_area

#: How far boxes and polygons may reach beyond the image, in px: COCO's own do, by rounding.
BORDER_TOLERANCE = 1.0


@dataclass(frozen=True)
class Category:
    """A category of the annotation file; ids may have gaps."""

    id: int
    name: str


@dataclass(frozen=True)
class Annotation:
    """One annotated object.

    Attributes:
        id: of the file.
        category_id: of the file.
        box: x1, y1, x2, y2 in px, inside the image.
        segmentation: polygons without the degenerate ones, or an RLE with compressed counts.
        crowd: a region with many objects; never a positive, ignored in evaluation.
        area: in px², as the file has it, or the mask's.
    """

    id: int
    category_id: int
    box: tuple[float, float, float, float]
    segmentation: Any
    crowd: bool
    area: float


@dataclass(frozen=True)
class ImageRecord:
    """One image of the file, and its annotations."""

    id: int
    file_name: str
    width: int
    height: int
    annotations: list[Annotation] = field(default_factory=list)

    @property
    def objects(self) -> list[Annotation]:
        """The annotations that can be a positive: all but the crowds."""
        return [annotation for annotation in self.annotations if not annotation.crowd]

    def object_masks(self) -> EncodedMasks:
        """The masks of `objects`, in their order."""
        return EncodedMasks.of_checked([o.segmentation for o in self.objects], self.height, self.width)


@dataclass(frozen=True)
class CocoData:
    """A checked COCO-format data set.

    Attributes:
        annotation_file: where it was read from.
        image_folder: where the images are.
        images: in the file's order.
        categories: by rising id; label i + 1 is category i, and 0 is background.
        warnings: what was repaired or is odd, a line each.
    """

    annotation_file: Path
    image_folder: Path
    images: list[ImageRecord]
    categories: tuple[Category, ...]
    warnings: list[str]

    def image_path(self, image: ImageRecord) -> Path:
        """Where the image's file is."""
        return self.image_folder / image.file_name

    @property
    def labels(self) -> dict[int, int]:
        """The label of each category id, from 1."""
        return {category.id: index + 1 for index, category in enumerate(self.categories)}

    @property
    def num_objects(self) -> int:
        """Annotations that can be a positive."""
        return sum(len(image.objects) for image in self.images)


@dataclass(frozen=True)
class Problem:
    """Something wrong in an annotation file."""

    text: str
    error: bool = True

    def __str__(self) -> str:
        return f"{'error' if self.error else 'warning'}: {self.text}"


def read_coco(
    image_folder: str | os.PathLike[str],
    annotation_file: str | os.PathLike[str],
    *,
    categories: Sequence[Category] | None = None,
) -> CocoData:
    """Read and check a COCO-format file.

    Args:
        image_folder: where the `file_name`s are.
        annotation_file: JSON with images, annotations and categories.
        categories: those of the model or of the training set; the file's must be among them. None takes the
            file's own.

    Returns:
        The data set; polygons that are degenerate beside good ones of the same object are left out, and
        `warnings` counts them.

    Raises:
        InputError: anything else is wrong; the message names the file, the image or annotation and the field,
            and how many more errors there are.
    """
    data, problems = _read(Path(annotation_file), existing_folder(image_folder, "images"), categories)
    errors = [problem.text for problem in problems if problem.error]
    if errors:
        more = f" (and {len(errors) - 1} more, `maskloss check` lists them)" if len(errors) > 1 else ""
        raise InputError(errors[0] + more)
    assert data is not None
    return data


def find_problems(
    image_folder: str | os.PathLike[str], annotation_file: str | os.PathLike[str]
) -> tuple[CocoData | None, list[Problem]]:
    """Read a COCO-format file and list everything wrong with it.

    Returns:
        The data set without what has errors, or None where nothing can be read; and the problems.
    """
    return _read(Path(annotation_file), existing_folder(image_folder, "images"), None)


def _read(
    path: Path, image_folder: Path, categories: Sequence[Category] | None
) -> tuple[CocoData | None, list[Problem]]:
    problems: list[Problem] = []

    def error(text: str) -> None:
        problems.append(Problem(f"{path}: {text}"))

    content = read_bytes(path)
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as failure:
        error(f"not valid JSON, broken or truncated: {failure}")
        return None, problems
    missing = [key for key in ("images", "annotations", "categories") if not _has_list(document, key)]
    if missing:
        error(f"not a COCO-format file: it has no list of {', '.join(missing)}")
        return None, problems

    own_categories = _read_categories(document["categories"], error)
    kept = _reconciled(own_categories, categories, error)
    images = _read_images(document["images"], image_folder, error)
    skipped = _read_annotations(
        document["annotations"], images, {category.id for category in own_categories}, error
    )
    warnings = []
    if skipped:
        shown = ", ".join(str(identity) for identity in skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        warnings.append(
            f"{path}: left out {len(skipped)} degenerate polygons beside good ones, of annotations {shown}"
        )
        problems += [
            Problem(
                f"{path}: annotation {identity}: segmentation: a degenerate polygon is left out", error=False
            )
            for identity in skipped
        ]
    data = CocoData(path, image_folder, list(images.values()), kept, warnings)
    if not problems and not data.images:
        error("there is no image in it")
    return data, problems


def _has_list(document: Any, key: str) -> bool:
    return isinstance(document, dict) and isinstance(document.get(key), list)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond what a float holds
        return False


def _entries(items: list[Any], kind: str, keys: tuple[str, ...], error: Any) -> list[dict[str, Any]]:
    """The entries that are objects with the keys and an id of their own."""
    good: list[dict[str, Any]] = []
    seen: set[int] = set()
    for position, item in enumerate(items):
        if not isinstance(item, dict):
            error(f"{kind} number {position}: expected an object, got {type(item).__name__}")
            continue
        name = f"{kind} {item['id']}" if "id" in item else f"{kind} number {position}"
        missing = [key for key in keys if key not in item]
        if missing:
            error(f"{name}: missing {', '.join(missing)}")
        elif not _is_id(item["id"]):
            error(f"{name}: id must be an integer")
        elif item["id"] in seen:
            error(f"{name}: the id is there twice")
        else:
            seen.add(item["id"])
            good.append(item)
    return good


def _read_categories(items: list[Any], error: Any) -> list[Category]:
    categories = [
        Category(item["id"], str(item["name"])) for item in _entries(items, "category", ("id", "name"), error)
    ]
    if not categories:
        error("there is no category in it")
    return sorted(categories, key=lambda category: category.id)


def _reconciled(own: list[Category], given: Sequence[Category] | None, error: Any) -> tuple[Category, ...]:
    """The categories that labels are counted from: the given ones, if the file's are among them."""
    if given is None:
        return tuple(own)
    names = {category.id: category.name for category in given}
    for category in own:
        if category.id not in names:
            error(f"category {category.id}: {category.name!r} is not among the model's categories")
        elif names[category.id] != category.name:
            error(
                f"category {category.id}: is {category.name!r} here, but {names[category.id]!r} among the "
                "model's categories"
            )
    return tuple(given)


def _read_images(items: list[Any], folder: Path, error: Any) -> dict[int, ImageRecord]:
    images: dict[int, ImageRecord] = {}
    for item in _entries(items, "image", ("id", "file_name", "width", "height"), error):
        name = f"image {item['id']}"
        file_name = item["file_name"]
        if not isinstance(file_name, str) or not file_name or "\0" in file_name:
            error(f"{name}: file_name must be a file's name, not {file_name!r}")
        elif not _stays_inside(file_name):
            error(f"{name}: file_name {file_name!r} leaves the image folder")
        elif not all(_is_id(item[key]) and item[key] > 0 for key in ("width", "height")):
            error(
                f"{name}: width and height must be positive integers, not {item['width']!r} and {item['height']!r}"
            )
        elif not os.path.isfile(folder / file_name):
            error(f"{name}: the file {folder / file_name} does not exist")
        else:
            images[item["id"]] = ImageRecord(item["id"], file_name, item["width"], item["height"])
    return images


def _stays_inside(file_name: str) -> bool:
    """Judged by the name alone: links inside the folder are the user's own affair."""
    normal = os.path.normpath(file_name)
    return not (os.path.isabs(normal) or normal == ".." or normal.startswith(".." + os.sep))


def _read_annotations(
    items: list[Any], images: dict[int, ImageRecord], categories: set[int], error: Any
) -> list[int]:
    """Add each good annotation to its image; give the ids of those that lost a degenerate polygon."""
    skipped: list[int] = []
    keys = ("id", "image_id", "category_id", "bbox", "segmentation")
    for item in _entries(items, "annotation", keys, error):
        name = f"annotation {item['id']}"
        if not _is_id(item["image_id"]) or item["image_id"] not in images:
            error(f"{name}: image_id {item['image_id']!r} is no image of the file, or one with an error")
            continue
        if not _is_id(item["category_id"]) or item["category_id"] not in categories:
            error(f"{name}: category_id {item['category_id']!r} is not in the file")
            continue
        image = images[item["image_id"]]
        crowd = item.get("iscrowd", 0)
        try:
            if crowd not in (0, 1):
                raise ValueError(f"iscrowd must be 0 or 1, not {crowd!r}")
            box = _checked_box(item["bbox"], image)
            segmentation, lost = _checked_segmentation(item["segmentation"], image)
        except ValueError as failure:
            error(f"{name}: {failure} (image {image.id}, {image.file_name})")
            continue
        skipped += [item["id"]] * lost
        area = item.get("area")
        area = float(area) if area is not None and _is_number(area) else _mask_area(segmentation)
        image.annotations.append(
            Annotation(item["id"], item["category_id"], box, segmentation, bool(crowd), area)
        )
    return skipped


def _checked_box(box: Any, image: ImageRecord) -> tuple[float, float, float, float]:
    if not (isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)):
        raise ValueError(f"bbox must be four finite numbers x, y, width, height, not {box!r}")
    x, y, width, height = box
    if width <= 0 or height <= 0:
        raise ValueError(f"bbox has a side that is zero or negative: {box}")
    far = BORDER_TOLERANCE
    if x < -far or y < -far or x + width > image.width + far or y + height > image.height + far:
        raise ValueError(
            f"bbox {box} reaches outside the image of {image.width} x {image.height} (width x height)"
        )
    clipped = (max(x, 0.0), max(y, 0.0), min(x + width, image.width), min(y + height, image.height))
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        raise ValueError(
            f"bbox {box} lies outside the image of {image.width} x {image.height} (width x height)"
        )
    # Targets are float32.
    corners = np.array(clipped, dtype=np.float32)
    if (corners[2:] <= corners[:2]).any():
        raise ValueError(f"bbox {box} has a side that is too small to be told from 0")
    return clipped


def _mask_area(segmentation: Any) -> float:
    if isinstance(segmentation, dict):
        return float(coco_mask.area(segmentation))
    return sum(polygon_area(checked_polygon(polygon, "segmentation")) for polygon in segmentation)


def _checked_segmentation(segmentation: Any, image: ImageRecord) -> tuple[Any, int]:
    """The segmentation without degenerate polygons, and how many those were."""
    if isinstance(segmentation, dict):
        rle = checked_rle(segmentation, image.height, image.width, "segmentation")
        if _mask_area(rle) == 0:
            raise ValueError("segmentation: the RLE has no pixel")
        return rle, 0
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("segmentation must be a list of polygons or an RLE, and not empty")
    good, reasons = [], []
    for polygon in segmentation:
        if isinstance(polygon, list) and len(polygon) % 2 == 0 and len(polygon) < 6:
            reasons.append(f"a polygon has {len(polygon) // 2} points, fewer than 3")
            continue
        points = checked_polygon(polygon, "segmentation")
        low, high = points.min(axis=0), points.max(axis=0)
        limit = (image.width + BORDER_TOLERANCE, image.height + BORDER_TOLERANCE)
        if (low < -BORDER_TOLERANCE).any() or (high > limit).any():
            raise ValueError(
                f"segmentation: a polygon reaches outside the image of {image.width} x {image.height} "
                f"(width x height): x {low[0]:g} to {high[0]:g}, y {low[1]:g} to {high[1]:g}"
            )
        if polygon_area(points) == 0:
            reasons.append("a polygon has no area")
            continue
        good.append(polygon)
    if not good:
        raise ValueError(f"segmentation: {reasons[0]}")
    return good, len(reasons)
