"""Validation of a whole data set before training, including every image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from maskloss.data.coco import decode_file, read_content
from maskloss.data.findings import Findings, Kind, Problem, shown
from maskloss.data.images import has_no_end, is_turned_unseen, read_image, read_image_size
from maskloss.data.reading.images import (
    SIZE_DIFFERS,
    TURNED_SIZE,
    size_text,
    unreadable_kind,
    unreadable_text,
)
from maskloss.data.records import (
    NO_MASK,
    POLYGONS,
    RLE,
    BoolArray,
    CocoData,
    ImageRecord,
    Records,
    polygon_extents,
)
from maskloss.errors import InputError
from maskloss.files import existing_folder
from maskloss.masks.encoded import FloatArray, IntArray

#: Largest distance in px between the sides of a box and its mask's extent without a warning.
_BOX_TOLERANCE = 3.0
# Bounds of the search for polygons inside other polygons of an annotation: see `_rows_with_holes`.
_MOST_OUTER, _MOST_VERTICES, _MOST_TESTS = 100, 100, 10_000_000
#: Tests that take as long as calling the function that makes them.
_TESTS_PER_CALL = 1_000
#: Most pairs of a vertex and an edge that are computed at once.
_CHUNK = 1_000_000

LISTED_TWICE = Kind("listed_twice", "image", False, "image files are listed twice or more")
TURNED = Kind(
    "turned",
    "image",
    False,
    "images are rotated or mirrored by EXIF without a change of size, so annotations of the stored image fit, too",
)
NO_END = Kind(
    "no_end", "image", False, "JPEG files lack their end marker, so a part of the image may be missing (gray)"
)
NO_USABLE_OBJECT = Kind("no_usable_object", "file", True)
NO_ANNOTATION = Kind("no_annotation", "image", False)
UNUSED_CATEGORY = Kind("unused_category", "category", False)
BOX_FAR = Kind(
    "box_far",
    "annotation",
    False,
    "boxes do not fit their masks",
    "if they are wrong, `maskloss repair --boxes from-masks` takes the masks' extents",
)
REPEATED = Kind(
    "repeated",
    "annotation",
    False,
    "annotations repeat another one of their image, with the same category, box and mask; each counts as an object",
)
HOLE = Kind(
    "hole",
    "annotation",
    False,
    "annotations have a polygon inside another one: COCO has no holes, so it is filled",
)


def check_data(
    image_folder: str | os.PathLike[str], annotation_file: str | os.PathLike[str], *, progress: bool = False
) -> tuple[CocoData | None, list[Problem]]:
    """Read the annotations, decode every image, and return all problems.

    Args:
        image_folder: folder that the `file_name`s are relative to.
        annotation_file: COCO-format JSON.
        progress: whether to show a progress bar on stderr if that is a terminal.

    Returns:
        The data set without the entries that have errors, or None if the file cannot be decoded; and the problems, one
        for each kind. Errors are faults that `read_coco` or the data loader refuses. Warnings are deviations that
        `read_coco` corrects, and data that can be trained on but may be a mistake: boxes that do not fit their masks,
        categories and images without objects, files that are listed twice. In an annotation of hundreds of polygons or
        of thousands of vertices, only a sample of them is searched for polygons inside other polygons.

    Raises:
        InputError: the image folder or the annotation file does not exist.
    """
    path, folder = Path(annotation_file), existing_folder(image_folder, "images")
    findings = Findings()
    content = decode_file(path, findings)
    if content is None:
        return None, findings.problems(str(path))
    data, _ = read_content(content, path, folder, None, findings)
    del content
    data.warnings.extend(problem.text for problem in findings.problems(str(path)) if not problem.error)
    decode_images(data, findings, progress=progress)
    _find_oddities(data, findings)
    return data, findings.problems(str(path))


def decode_images(data: CocoData, findings: Findings, *, progress: bool = False) -> None:
    """Decode every image, and add those that cannot be decoded to the findings."""
    positions = range(len(data.images))
    already_said = {finding.name for finding in findings.of(TURNED_SIZE)}
    for index in tqdm(positions, desc="images", disable=None if progress else True, leave=False):
        image = data.images[index]
        name, path = f"image {image.id}", data.image_path(image)
        try:
            read_image(path, (image.width, image.height))
            if name not in already_said and is_turned_unseen(path):
                text = "is rotated or mirrored as its EXIF orientation says, which keeps its size"
                findings.add(TURNED, index, name, f"{image.file_name[:80]} {text}")
            if has_no_end(path):
                text = "lacks the end marker of a JPEG, so a part of the image may be missing (gray)"
                findings.add(NO_END, index, name, f"{image.file_name[:80]} {text}")
        except InputError as error:
            _report_unreadable(image, path, error, findings)


def _report_unreadable(image: ImageRecord, path: Path, error: InputError, findings: Findings) -> None:
    name, recorded = f"image {image.id}", (image.width, image.height)
    try:
        size = read_image_size(path, recorded)
    except InputError:
        size = recorded
    if size != recorded:
        findings.add(SIZE_DIFFERS, -1, name, size_text(image.file_name, size, recorded), (image.id, size))
        return
    findings.add(unreadable_kind(error), -1, name, unreadable_text(image.file_name, error), image.id)


def _find_oddities(data: CocoData, findings: Findings) -> None:
    records = data.records
    if data.num_objects == 0 and not findings.any_error:
        findings.add(NO_USABLE_OBJECT, -1, "", "contains no usable object")
    names: dict[str, list[int]] = {}
    for index, image in enumerate(data.images):
        names.setdefault(image.file_name, []).append(index)
    for name, indices in names.items():
        if len(indices) > 1:
            findings.add(LISTED_TWICE, -1, "", f"{len(indices)} images have the file_name {shown(name)}")
    owner, extents = _part_extents(records)
    distances = _box_distances(records, owner, extents)
    for row in np.nonzero(distances > _BOX_TOLERANCE)[0].tolist():
        text = f"bbox is up to {distances[row]:.1f} px from the segmentation's extent"
        findings.add(BOX_FAR, row, f"annotation {records.ids[row]}", f"{text} ({_image_of(data, row)})")
    for row, other in _repeated_rows(records):
        text = f"repeats annotation {records.ids[other]} ({_image_of(data, row)})"
        findings.add(REPEATED, row, f"annotation {records.ids[row]}", text)
    for row in _rows_with_holes(records, owner, extents):
        findings.add(
            HOLE,
            row,
            f"annotation {records.ids[row]}",
            f"segmentation: a polygon inside another one is filled ({_image_of(data, row)})",
        )
    empty = int((np.diff(records.first) == 0).sum())
    if empty and not findings.any_error:
        findings.add(NO_ANNOTATION, -1, "", f"{empty} images have no annotation; they train as background")
    # After an error, the missing category may be that of an annotation that the error left out.
    used = set(np.unique(records.category_ids).tolist())
    unused = [category.name for category in data.categories if category.id not in used]
    if unused and not findings.any_error:
        shortened = ", ".join(unused[:10]) + (f" and {len(unused) - 10} more" if len(unused) > 10 else "")
        findings.add(UNUSED_CATEGORY, -1, "", f"no object of the categories {shortened}")


def _image_of(data: CocoData, row: int) -> str:
    image = data.images[data.records.image_of(row)]
    return f"image {image.id}, {image.file_name[:80]}"


def _part_extents(records: Records) -> tuple[IntArray, FloatArray]:
    """Return each polygon's annotation row, (P,), and extent, (P, 4) xyxy."""
    rows = np.nonzero(records.form == POLYGONS)[0]
    owner = np.repeat(rows, records.part_count[rows])
    step = np.arange(len(owner)) - np.repeat(
        records.part_count[rows].cumsum() - records.part_count[rows], records.part_count[rows]
    )
    parts = np.repeat(records.part_first[rows], records.part_count[rows]) + step
    low, high = polygon_extents(records.coordinates, records.point_first, records.point_count)
    return owner, np.concatenate([low[parts], high[parts]], axis=1)


def _box_distances(records: Records, owner: IntArray, parts: FloatArray) -> FloatArray:
    """Return the largest distance in px between the sides of each annotation's box and its mask's extent, (A,).

    The extents are clipped to the image. The distance is 0 for crowds and annotations without a mask.
    """
    extents = np.empty((len(records.ids), 4))
    extents[:, :2], extents[:, 2:] = np.inf, -np.inf
    for side, function in ((0, np.minimum), (2, np.maximum)):
        corners = extents[:, side : side + 2].copy()
        function.at(corners, owner, parts[:, side : side + 2])
        extents[:, side : side + 2] = corners
    for row in np.nonzero(records.form == RLE)[0].tolist():
        x, y, width, height = coco_mask.toBbox(records.mask(row))
        extents[row] = x, y, x + width, y + height
    image = np.repeat(np.arange(len(records.image_ids)), np.diff(records.first))
    size = np.stack([records.widths[image], records.heights[image]] * 2, axis=1)
    distances = np.abs(np.clip(extents, 0, size) - records.boxes).max(axis=1, initial=0.0)
    distances[(records.form == NO_MASK) | records.crowds] = 0.0
    return distances


def _repeated_rows(records: Records) -> Iterator[tuple[int, int]]:
    """Yield the rows of objects that repeat another object of their image, and the row of the first such object."""
    rows = np.nonzero(~records.crowds)[0]
    image = np.repeat(np.arange(len(records.image_ids)), np.diff(records.first))
    _, category = np.unique(records.category_ids, return_inverse=True)
    keys = np.column_stack([image, category, records.form, records.boxes])[rows]
    # Compare masks only where everything else is equal.
    _, group, count = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    first: dict[Any, int] = {}
    for row, number in zip(rows[count[group] > 1].tolist(), group[count[group] > 1].tolist(), strict=True):
        mask = records.mask(row)
        content = (
            tuple(polygon.tobytes() for polygon in mask)
            if isinstance(mask, list)
            else mask and mask["counts"]
        )
        other = first.setdefault((number, content), row)
        if other != row:
            yield row, other


def _rows_with_holes(records: Records, owner: IntArray, extents: FloatArray) -> Iterator[int]:
    """Yield the rows of annotations that have a polygon inside another of their polygons.

    The time is bounded: only the largest `_MOST_OUTER` polygons of an annotation may contain others, a polygon is
    inside if `_MOST_VERTICES` of its vertices are, and after `_MOST_TESTS` vertices and edges the rest is not tested.
    """
    starts = np.nonzero(np.diff(owner, prepend=-1))[0].tolist()
    for first, last in pairwise([*starts, len(owner)]):
        if last - first >= 2 and _has_hole(records, int(owner[first]), extents[first:last]):
            yield int(owner[first])


def _has_hole(records: Records, row: int, extents: FloatArray) -> bool:
    """Return whether an annotation has a polygon inside another one, given the extents (P, 4) of its polygons."""
    low, high = extents[:, :2], extents[:, 2:]
    largest = np.argsort(-(high - low).prod(axis=1), kind="stable")[:_MOST_OUTER]
    polygons: list[FloatArray] = []
    tests = 0
    for outer in largest.tolist():
        inside = (low >= low[outer]).all(axis=1) & (high <= high[outer]).all(axis=1)
        inside[outer] = False
        candidates = np.nonzero(inside)[0]
        if len(candidates) == 0:
            continue
        polygons = polygons or records.polygons(row)
        edges = polygons[outer]
        # Most polygons that are not inside have their first vertex outside already.
        first = np.stack([polygons[inner][0] for inner in candidates])
        tests += len(first) * len(edges)
        for inner in candidates[_are_inside(first, edges)].tolist():
            vertices = polygons[inner][:: -(-len(polygons[inner]) // _MOST_VERTICES)]
            if _are_inside(vertices, edges).all():
                return True
            tests += len(vertices) * len(edges) + _TESTS_PER_CALL
            if tests > _MOST_TESTS:
                return False
        if tests > _MOST_TESTS:
            return False
    return False


def _are_inside(points: FloatArray, outer: FloatArray) -> BoolArray:
    """Return whether each point lies inside `outer`, by counting the outer edges to its right."""
    following = np.roll(outer, -1, axis=0)
    inside = np.empty(len(points), dtype=bool)
    # In chunks, to keep the arrays of all pairs of points and edges small.
    chunk = max(_CHUNK // len(outer), 1)
    for start in range(0, len(points), chunk):
        x, y = points[start : start + chunk, :1], points[start : start + chunk, 1:]
        crosses = (outer[:, 1] > y) != (following[:, 1] > y)  # (V, E)
        with np.errstate(divide="ignore", invalid="ignore"):
            at = outer[:, 0] + (y - outer[:, 1]) / (following[:, 1] - outer[:, 1]) * (
                following[:, 0] - outer[:, 0]
            )
        inside[start : start + chunk] = (crosses & (x < at)).sum(axis=1) % 2 == 1
    return inside
