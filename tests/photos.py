"""Real photographs that anybody's clone has, with COCO's annotations; `data/photos/CREDITS.md` has whose they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

FOLDER = Path(__file__).parent / "data" / "photos"
ANNOTATIONS = FOLDER / "annotations.json"

#: Places in `read_photos()`: many objects and a crowd; two objects; six in an upright image; and none at all.
CROWDED, FEW, UPRIGHT, WITHOUT = 0, 1, 2, 3


def read_photos() -> list[tuple[Tensor, dict[str, Any]]]:
    """Return each photograph, (3, H, W) in [0, 1], and its target; crowds are left out as in torchvision's training."""
    data = json.loads(ANNOTATIONS.read_text())
    return [read_photo(FOLDER, image, data["annotations"]) for image in data["images"]]


def read_photo(
    folder: Path, image: dict[str, Any], annotations: list[dict[str, Any]]
) -> tuple[Tensor, dict[str, Any]]:
    """Return the photograph of a COCO file's entry, and a target of those of the annotations that are its own."""
    with Image.open(folder / image["file_name"]) as file:
        pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1) / 255
    height, width = pixels.shape[1:]
    objects = [a for a in annotations if a["image_id"] == image["id"] and not a["iscrowd"]]
    boxes = torch.tensor([one["bbox"] for one in objects]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = np.zeros((len(objects), height, width), dtype=np.uint8)
    for mask, one in zip(masks, objects, strict=True):
        rles = coco_mask.frPyObjects(one["segmentation"], height, width)
        mask[:] = coco_mask.decode(coco_mask.merge(rles))
    labels = torch.tensor([one["category_id"] for one in objects], dtype=torch.int64)
    target = {"boxes": boxes, "labels": labels, "masks": torch.from_numpy(masks), "image_id": image["id"]}
    return pixels, target
