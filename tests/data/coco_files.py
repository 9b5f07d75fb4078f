"""A small, valid COCO-format data set on disk, which tests change, and the messages about a changed one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskloss.data.coco import read_coco
from maskloss.errors import InputError

Change = Callable[[dict[str, Any]], object]

WIDTH, HEIGHT = 8, 5

#: The mask of columns 2 and 3, rows 1 and 2. Runs go down the columns: 11 pixels of background (two columns and a
#: pixel), 2 of the object, 3 of background around the column's end, 2 of the object, and the rest of the 40 pixels.
RECTANGLE_COUNTS = [11, 2, 3, 2, 22]


def good_document() -> dict[str, Any]:
    """Make a document of two images of 8 x 5 px, categories 3 and 7, and one segmentation of each kind."""
    return {
        "images": [
            {"id": 10, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 20, "file_name": "nested/b.png", "width": WIDTH, "height": HEIGHT},
        ],
        "annotations": [
            {
                "id": 101,
                "image_id": 10,
                "category_id": 7,
                "bbox": [2, 1, 2, 2],
                "area": 4,
                "iscrowd": 0,
                "segmentation": [[2, 1, 4, 1, 4, 3, 2, 3]],
            },
            {
                "id": 102,
                "image_id": 10,
                "category_id": 3,
                "bbox": [2, 1, 2, 2],
                "area": 4,
                "iscrowd": 0,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": RECTANGLE_COUNTS},
            },
            {
                "id": 103,
                "image_id": 10,
                "category_id": 3,
                "bbox": [0, 0, 8, 5],
                "area": 40,
                "iscrowd": 1,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 40]},
            },
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def write_coco(
    folder: Path, change: Change | None = None, name: str = "annotations.json"
) -> tuple[Path, Path]:
    """Write the images and the annotations, changed in place by `change`, and return the paths of both."""
    document = good_document()
    if change is not None:
        change(document)
    images = folder / "images"
    (images / "nested").mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for file_name in ("a.png", "nested/b.png"):
        Image.fromarray(pixels).save(images / file_name)
    (folder / name).write_text(json.dumps(document))
    return images, folder / name


def refusal(folder: Path, change: Change) -> str:
    """Return the error message for a changed data set: one line that starts with the file."""
    images, annotations = write_coco(folder, change)
    with pytest.raises(InputError) as caught:
        read_coco(images, annotations)
    text = str(caught.value)
    assert text.startswith(f"{annotations}: ")
    assert "\n" not in text
    return text


def left_out(folder: Path, change: Change) -> str:
    """Return the warning that annotation 101 of a changed data set is left out."""
    data = read_coco(*write_coco(folder, change))
    assert [annotation.id for annotation in data.images[0].annotations] == [102, 103]
    return data.warnings[0]


def in_annotation(**fields: Any) -> Change:
    """Set fields of annotation 101."""
    return lambda document: document["annotations"][0].update(fields)


def in_image(**fields: Any) -> Change:
    """Set fields of image 10."""
    return lambda document: document["images"][0].update(fields)


def compressed(counts: list[int], size: tuple[int, int] = (HEIGHT, WIDTH)) -> str:
    """Compress the counts of an RLE."""
    rle = coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)
    return rle["counts"].decode()
