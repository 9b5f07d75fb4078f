"""A data set of rectangles, of all size classes, as polygons, RLEs and crowds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from maskloss.data.coco import CocoData, read_coco

SIZE = 160


def rectangle(
    x: int, y: int, width: int, height: int, size: tuple[int, int] = (SIZE, SIZE)
) -> dict[str, Any]:
    mask = np.zeros(size, dtype=np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    rle = coco_mask.encode(mask)
    return {"size": list(size), "counts": rle["counts"].decode()}


def write_rectangles(folder: Path, *, sides: tuple[int, int] = (6, 150), crowds: bool = True) -> CocoData:
    """Six images with up to six rectangles each, of all size classes, polygons, RLEs and crowds."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, 7):
        Image.new("RGB", (SIZE, SIZE)).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": SIZE, "height": SIZE})
        for position in range(number):
            width, height = (int(v) for v in random.integers(*sides, 2))
            x, y = int(random.integers(0, SIZE - width)), int(random.integers(0, SIZE - height))
            crowd = crowds and position == 1
            polygon = [[x, y, x + width, y, x + width, y + height, x, y + height]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(random.choice([2, 5, 9])),
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": int(crowd),
                    "segmentation": rectangle(x, y, width, height) if crowd or position % 2 else polygon,
                }
            )
    categories = [{"id": identity, "name": str(identity)} for identity in (2, 5, 9)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(document))
    return read_coco(folder / "images", folder / "annotations.json")
