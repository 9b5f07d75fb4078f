"""Prediction of large images by overlapping tiles, whose detections are merged by the overlap of their masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

#: Share of a tile that overlaps with its neighbor, at least.
OVERLAP = 0.25
#: Overlap of two detections of the same object, as a share of the smaller one.
_SAME_OBJECT = 0.5


@dataclass(frozen=True)
class Tile:
    """A part of an image, in px."""

    left: int
    top: int
    width: int
    height: int


def tiles_of(width: int, height: int, side: int) -> list[Tile]:
    """Cut an image into overlapping tiles.

    Args:
        width: width of the image in px.
        height: height of the image in px.
        side: width and height of a tile in px; smaller where the image is smaller.

    Returns:
        The tiles, row by row. Neighbors overlap by at least a quarter of their side.

    Example:
        >>> [tile.left for tile in tiles_of(1000, 300, 400)]
        [0, 300, 600]
    """
    return [
        Tile(left, top, min(side, width), min(side, height))
        for top in _starts(height, side)
        for left in _starts(width, side)
    ]


def _starts(length: int, side: int) -> list[int]:
    """Return where evenly spread tiles of `side` px start, so that they cover `length` px."""
    if length <= side:
        return [0]
    count = math.ceil((length - side) / (side * (1 - OVERLAP))) + 1
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def is_cut(boxes: Tensor, tile: Tile, width: int, height: int) -> Tensor:
    """Return whether boxes (D, 4) in px of a tile touch an edge of it that is not an edge of the image, (D,) bool."""
    margin = 1.0
    cut = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    if tile.left > 0:
        cut |= x1 <= margin
    if tile.top > 0:
        cut |= y1 <= margin
    if tile.left + tile.width < width:
        cut |= x2 >= tile.width - margin
    if tile.top + tile.height < height:
        cut |= y2 >= tile.height - margin
    return cut


def in_image(detection: Mapping[str, Tensor], tile: Tile) -> dict[str, Tensor]:
    """Return the detections of a tile with their boxes in px of the image."""
    corner = detection["boxes"].new_tensor([tile.left, tile.top, tile.left, tile.top])
    return {**detection, "boxes": detection["boxes"] + corner}


def merged(results: Sequence[dict[str, Any]], cut: Sequence[bool]) -> list[dict[str, Any]]:
    """Drop the detections that are parts or repetitions of others.

    Whole objects are taken first, by descending score, then those that are cut by a tile's edge. A detection is dropped
    if it overlaps with one of its category that was taken, by half of the smaller one's area or more.

    Args:
        results: COCO results of all tiles, in px of the image.
        cut: whether each is cut by the edge of its tile.

    Returns:
        The others, by descending score.
    """
    order = sorted(range(len(results)), key=lambda i: (cut[i], -float(results[i]["score"])))
    taken: list[int] = []
    for category in {result["category_id"] for result in results}:
        own = [i for i in order if results[i]["category_id"] == category]
        overlaps = _overlaps([results[i] for i in own])
        kept: list[int] = []
        for place in range(len(own)):
            if not kept or overlaps[place, kept].max() < _SAME_OBJECT:
                kept.append(place)
        taken += [own[place] for place in kept]
    return sorted((results[i] for i in taken), key=lambda result: -float(result["score"]))


def _overlaps(results: Sequence[Mapping[str, Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the intersection of each pair of detections, as a share of the smaller one's area."""
    if all("segmentation" in result for result in results):
        shapes: Any = [result["segmentation"] for result in results]
    else:
        shapes = np.array([result["bbox"] for result in results], dtype=np.float64)
    # pycocotools divides the intersection with a crowd by the area of the other.
    shares = np.asarray(coco_mask.iou(shapes, shapes, [1] * len(results)), dtype=np.float64)
    # An empty mask has no area to divide by.
    shares = np.nan_to_num(shares)
    return np.maximum(shares, shares.T)
