"""A smaller data set out of a large one: some images, some categories."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskloss.data.coco import CocoData, read_coco
from maskloss.errors import InputError
from maskloss.files import copy_file, expect_unused, make_folder, read_bytes, write_text


def write_subset(
    image_folder: str,
    annotation_file: str,
    output: str,
    *,
    images_per_class: int | None = None,
    max_images: int | None = None,
    categories: Sequence[str] | None = None,
) -> CocoData:
    """Copy some images and their annotations into `output`, as `images/` and `annotations.json`.

    Images are taken in the file's order, so the same call gives the same subset. Annotations are copied as
    they stand.

    Args:
        image_folder: of the large set.
        annotation_file: of the large set.
        output: a new or empty folder.
        images_per_class: take images until each category that has so many is in that many images.
        max_images: take at most so many images.
        categories: names; only these categories, and images with at least one object of them.

    Returns:
        The subset, read back.

    Raises:
        InputError: the large set has errors, a category is unknown, nothing is left, or `output` holds
            something already.
    """
    data = read_coco(image_folder, annotation_file)
    if images_per_class is None and max_images is None and categories is None:
        raise InputError(
            "give --images-per-class, --max-images or --categories, or the subset is the whole set"
        )
    for name, value in (("images-per-class", images_per_class), ("max-images", max_images)):
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    kept_categories = _category_ids(data, categories)
    chosen = _chosen_images(data, kept_categories, images_per_class, max_images, categories is not None)
    if not chosen:
        raise InputError(f"{annotation_file}: no image has an object of these categories")

    folder = Path(output)
    expect_unused(folder)
    document: dict[str, Any] = json.loads(read_bytes(data.annotation_file))
    document["images"] = [image for image in document["images"] if image["id"] in chosen]
    document["annotations"] = [
        annotation
        for annotation in document["annotations"]
        if annotation["image_id"] in chosen and annotation["category_id"] in kept_categories
    ]
    document["categories"] = [c for c in document["categories"] if c["id"] in kept_categories]
    make_folder(folder / "images")
    for image in data.images:
        if image.id in chosen:
            destination = folder / "images" / image.file_name
            make_folder(destination.parent)
            copy_file(data.image_path(image), destination)
    # Last, so that a folder with an annotation file is a whole subset.
    write_text(folder / "annotations.json", json.dumps(document))
    return read_coco(folder / "images", folder / "annotations.json")


def _category_ids(data: CocoData, names: Sequence[str] | None) -> set[int]:
    if names is None:
        return {category.id for category in data.categories}
    by_name = {category.name: category.id for category in data.categories}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise InputError(f"{data.annotation_file}: no category is named {', '.join(map(repr, unknown))}")
    return {by_name[name] for name in names}


def _chosen_images(
    data: CocoData,
    categories: set[int],
    images_per_class: int | None,
    max_images: int | None,
    objects_only: bool,
) -> set[int]:
    taken: list[int] = []
    images_of: Counter[int] = Counter()
    for image in data.images:
        if max_images is not None and len(taken) == max_images:
            break
        present = {a.category_id for a in image.annotations if not a.crowd} & categories
        if objects_only and not present:
            continue
        if images_per_class is not None and all(images_of[c] >= images_per_class for c in present):
            continue
        images_of.update(present)
        taken.append(image.id)
    return set(taken)
