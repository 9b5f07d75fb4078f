"""What would break or distort training, found before it starts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from maskloss.data.coco import Annotation, CocoData, Problem, find_problems
from maskloss.data.images import read_image
from maskloss.errors import InputError

#: A box further than this from its mask's, in px, is worth a warning.
_BOX_TOLERANCE = 3.0


def check_data(
    image_folder: str | os.PathLike[str], annotation_file: str | os.PathLike[str]
) -> tuple[CocoData | None, list[Problem]]:
    """Read the annotations and decode every image.

    Returns:
        The data set without what has errors, None where nothing can be read, and all problems: what
        `read_coco` and the data loader would refuse as errors; as warnings what they repair, and what trains
        but may not be meant: boxes that are not their masks', categories and images without objects, files
        that are listed twice.

    Raises:
        InputError: the image folder or the annotation file is not there.
    """
    data, problems = find_problems(image_folder, annotation_file)
    if data is None:
        return None, problems
    return data, [*problems, *_unreadable_images(data), *_oddities(data)]


def _unreadable_images(data: CocoData) -> Iterator[Problem]:
    for image in data.images:
        try:
            read_image(data.image_path(image), (image.width, image.height))
        except InputError as error:
            yield Problem(f"{error} (image {image.id} of {data.annotation_file})")


def _oddities(data: CocoData) -> Iterator[Problem]:
    path = data.annotation_file
    if data.num_objects == 0:
        yield Problem(f"{path}: there is no usable object in it")
    names = Counter(image.file_name for image in data.images)
    for name, count in names.items():
        if count > 1:
            yield Problem(f"{path}: {count} images have the file_name {name!r}", error=False)
    for image in data.images:
        for annotation in image.annotations:
            distance = 0.0 if annotation.crowd else _box_distance(annotation)
            if distance > _BOX_TOLERANCE:
                yield Problem(
                    f"{path}: annotation {annotation.id}: bbox is up to {distance:.1f} px from the "
                    f"segmentation's extent (image {image.id}, {image.file_name})",
                    error=False,
                )
    empty = sum(not image.annotations for image in data.images)
    if empty:
        yield Problem(f"{path}: {empty} images have no annotation; they train as background", error=False)
    used = {annotation.category_id for image in data.images for annotation in image.annotations}
    unused = [category.name for category in data.categories if category.id not in used]
    if unused:
        yield Problem(f"{path}: no object of the categories {', '.join(unused)}", error=False)


def _box_distance(annotation: Annotation) -> float:
    """Largest distance between the sides of the box and of the mask's extent, in px."""
    segmentation: Any = annotation.segmentation
    if isinstance(segmentation, dict):
        x, y, width, height = coco_mask.toBbox(segmentation)
        extent = np.array([x, y, x + width, y + height])
    else:
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in segmentation])
        extent = np.concatenate([points.min(axis=0), points.max(axis=0)])
    return float(np.abs(extent - annotation.box).max())
