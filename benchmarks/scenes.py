"""Inputs of the benchmarks: images of 800 x 1333 px with elliptic objects, proposals and FPN features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HEIGHT, WIDTH = 800, 1333
#: Range of object sizes, as the square root of the box's area, in px.
SMALLEST, LARGEST = 12.0, 600.0
#: Strides of the FPN levels.
STRIDES = {"0": 4, "1": 8, "2": 16, "3": 32, "pool": 64}


def scene_boxes(objects: int) -> Tensor:
    """Make the boxes of random objects, (G, 4)."""
    generator = torch.Generator().manual_seed(objects)
    side = SMALLEST * (LARGEST / SMALLEST) ** torch.rand(objects, generator=generator)
    aspect = torch.exp(0.4 * torch.randn(objects, generator=generator))
    size = torch.stack([(side * aspect).clamp(max=WIDTH - 2), (side / aspect).clamp(max=HEIGHT - 2)], dim=1)
    low = torch.rand(objects, 2, generator=generator) * (torch.tensor([WIDTH, HEIGHT]) - size)
    return torch.cat([low, low + size], dim=1)


def scene(objects: int) -> tuple[Tensor, list[list[list[float]]], Tensor]:
    """Make ellipses as bitmaps (G, H, W) uint8 and as polygons of 40 points, with their boxes (G, 4)."""
    boxes = scene_boxes(objects)
    center, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    masks = torch.zeros(objects, HEIGHT, WIDTH, dtype=torch.uint8)
    y, x = torch.arange(HEIGHT)[:, None] + 0.5, torch.arange(WIDTH) + 0.5
    angle = torch.arange(40) * 2 * math.pi / 40
    polygons = []
    for mask, (cx, cy), (rx, ry) in zip(masks, center.tolist(), radius.tolist(), strict=True):
        mask.copy_(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1)
        points = torch.stack([cx + rx * angle.cos(), cy + ry * angle.sin()], dim=1)
        polygons.append([points.reshape(-1).tolist()])
    return masks, polygons, boxes


def proposals(boxes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Make jittered boxes near objects, (count, 4), and the index of each one's object, (count,)."""
    generator = torch.Generator().manual_seed(count)
    matched = torch.randint(len(boxes), (count,), generator=generator)
    size = (boxes[:, 2:] - boxes[:, :2])[matched].repeat(1, 2)
    jittered = boxes[matched] + 0.05 * size * torch.randn(count, 4, generator=generator)
    limit = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    return jittered.clamp(min=torch.zeros(4), max=limit), matched


def fpn_features(images: int, device: torch.device) -> dict[str, Tensor]:
    """Make random features of a batch, (images, 256, H_l, W_l) by level, for images padded to multiples of 32."""
    return {
        name: torch.rand(images, 256, -(-HEIGHT // stride), -(-1344 // stride), device=device)
        for name, stride in STRIDES.items()
    }
