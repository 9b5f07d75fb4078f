"""A small, valid COCO-format data set on disk, which tests change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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
    folder: Path, change: Callable[[dict[str, Any]], object] | None = None, name: str = "annotations.json"
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
