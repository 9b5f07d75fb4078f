"""Images and targets in memory, which transforms move."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from maskloss.masks.encoded import EncodedMasks

HEIGHT, WIDTH = 96, 128


#: Boxes of three objects: a rectangle, a slanted polygon and an RLE, (G, 4) xyxy.
BOXES = [[10.0, 20.0, 50.0, 60.0], [60.0, 10.0, 120.0, 90.0], [30.0, 50.0, 70.0, 80.0]]


def scene() -> tuple[Tensor, dict[str, Any]]:
    """Make an image whose first channel is 255 on the objects, and its target."""
    rectangle = [10.0, 20.0, 50.0, 20.0, 50.0, 60.0, 10.0, 60.0]
    kite = [90.0, 10.0, 120.0, 40.0, 90.0, 90.0, 60.0, 40.0]
    bitmap = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    bitmap[50:80, 30:70] = 1
    masks = EncodedMasks([[rectangle], [kite], coco_mask.encode(bitmap)], HEIGHT, WIDTH)
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    image[0] = 255 * masks.bitmaps().amax(0)
    return image, {
        "boxes": torch.tensor(BOXES),
        "labels": torch.tensor([1, 2, 3]),
        "masks": masks,
        "image_id": 7,
    }


def extents(masks: Tensor) -> Tensor:
    """Return the boxes of masks. `masks_to_boxes` ends them at the last pixel's index, we at its outer edge."""
    return masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])


def overlap(masks: Tensor, others: Tensor) -> Tensor:
    """Return the IoU of each pair of masks."""
    return (masks & others).sum(dim=(1, 2)) / (masks | others).sum(dim=(1, 2))


def full_target() -> dict[str, Any]:
    """Make a target of two objects, the first in the right half, the second in the left, with all kinds of fields."""
    boxes = torch.tensor([[70.0, 20, 90, 40], [10.0, 20, 30, 40]])
    squares = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes.tolist()]
    return {
        "boxes": boxes,
        "labels": torch.tensor([1, 2]),
        "masks": EncodedMasks(squares, HEIGHT, WIDTH),
        "area": torch.tensor([900.0, 400.0]),
        "iscrowd": torch.tensor([1, 0]),
        "weights": torch.tensor([0.5, 2.0]),
        "has_mask": torch.tensor([False, True]),
        "names": ["right", "left"],
        "scores": np.array([0.1, 0.2]),
        "keypoints": torch.tensor([[[80.0, 30, 2], [75.0, 22, 1]], [[20.0, 30, 2], [12.0, 38, 0]]]),
        "points": torch.tensor([[[80.0, 30, 1], [99.0, 90, 0]], [[20.0, 30, 1], [50.0, 90, 0]]]),
        "ignore_boxes": torch.tensor([[60.0, 50, 100, 90], [0.0, 0, 40, 10], [100.0, 0, 120, 10]]),
        "image_id": 7,
        "orig_size": (HEIGHT, WIDTH),
        "note": "ab",
    }


def squares(*corners: tuple[int, int], side: int = 20) -> EncodedMasks:
    return EncodedMasks(
        [[[x, y, x + side, y, x + side, y + side, x, y + side]] for x, y in corners], 100, 100
    )


def two_squares(**entries: Any) -> tuple[Tensor, dict[str, Any]]:
    """Make an image of 100 x 100 px and a target of two 20 px squares, at (10, 10) and (60, 60)."""
    boxes = torch.tensor([[10.0, 10, 30, 30], [60.0, 60, 80, 80]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": squares((10, 10), (60, 60))}
    return torch.full((3, 100, 100), 50, dtype=torch.uint8), {**target, **entries}


class CropTo(v2.Transform):
    """Crop everything to the same window."""

    def __init__(self, top: int, left: int, height: int, width: int) -> None:
        super().__init__()
        self.window = (top, left, height, width)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(functional.crop, inpt, *self.window)


LARGE_SCALE_JITTER = v2.Compose(
    [
        v2.ScaleJitter((128, 128), (0.6, 1.6)),
        v2.RandomCrop((128, 128), pad_if_needed=True),
        v2.RandomHorizontalFlip(),
        v2.RandomPhotometricDistort(p=1.0),
    ]
)
