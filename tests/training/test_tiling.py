"""maskloss/training/tiling.py: tiles cover an image, and an object that several of them find is found once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from maskloss.training.tiling import Tile, in_image, is_cut, merged, tiles_of

SIZE = (100, 200)


@pytest.mark.parametrize(
    ("width", "height", "side"),
    [(1000, 300, 400), (401, 400, 400), (64, 64, 64), (3, 5000, 77), (12_000, 9_000, 1024)],
)
def test_tiles_cover_the_image_and_overlap_by_a_quarter(width: int, height: int, side: int) -> None:
    tiles = tiles_of(width, height, side)
    for length, starts, extent in (
        (width, sorted({tile.left for tile in tiles}), min(side, width)),
        (height, sorted({tile.top for tile in tiles}), min(side, height)),
    ):
        assert starts[0] == 0
        assert starts[-1] + extent == length
        overlaps = [first + extent - second for first, second in pairwise(starts)]
        # Places are rounded to pixels.
        assert all(overlap >= side / 4 - 1 for overlap in overlaps)
        # No tile more than needed.
        assert len(starts) <= 1 or length > extent + (len(starts) - 2) * 0.75 * side
    assert {(tile.width, tile.height) for tile in tiles} == {(min(side, width), min(side, height))}
    assert len(set(tiles)) == len(tiles)


def test_only_edges_inside_the_image_cut_objects() -> None:
    boxes = torch.tensor(
        [[0.0, 20, 30, 40], [20, 0.5, 30, 40], [20, 20, 99.5, 40], [20, 20, 40, 100], [20, 20, 40, 40]]
    )
    corner = Tile(0, 0, 100, 100)
    assert is_cut(boxes, corner, 300, 300).tolist() == [False, False, True, True, False]
    middle = Tile(100, 100, 100, 100)
    assert is_cut(boxes, middle, 300, 300).tolist() == [True, True, True, True, False]
    assert is_cut(boxes, corner, 100, 100).tolist() == [False] * 5


def test_boxes_move_with_their_tile() -> None:
    detection = {"boxes": torch.tensor([[1.0, 2, 3, 4]]), "labels": torch.tensor([1])}
    moved = in_image(detection, Tile(10, 20, 30, 40))
    assert moved["boxes"].tolist() == [[11, 22, 13, 24]]
    assert moved["labels"] is detection["labels"]


def found(
    x: int, y: int, width: int, height: int, score: float, category: int = 1, *, masked: bool = True
) -> Any:
    result: dict[str, Any] = {"category_id": category, "bbox": [x, y, width, height], "score": score}
    if masked:
        mask = np.zeros(SIZE, np.uint8)
        mask[y : y + height, x : x + width] = 1
        rle = coco_mask.encode(np.asfortranarray(mask))
        result["segmentation"] = {"size": list(SIZE), "counts": rle["counts"].decode()}
    return result


@pytest.mark.parametrize("masked", [True, False])
def test_repetitions_and_parts_are_dropped(masked: bool) -> None:
    whole, again = found(10, 10, 40, 40, 0.6, masked=masked), found(12, 10, 40, 40, 0.5, masked=masked)
    part = found(10, 10, 10, 40, 0.9, masked=masked)  # cut, and with a higher score than the whole
    apart = found(100, 10, 40, 40, 0.7, masked=masked)
    other = found(10, 10, 40, 40, 0.55, category=2, masked=masked)
    results = [part, again, whole, apart, other]
    assert merged(results, [True, False, False, False, False]) == [apart, whole, other]


def test_neighbors_that_overlap_little_stay() -> None:
    results = [found(10, 10, 40, 40, 0.9), found(35, 10, 40, 40, 0.8)]  # 3/8 of each
    assert merged(results, [False, False]) == results


def test_of_two_parts_the_better_one_stays() -> None:
    left, right = found(10, 10, 40, 40, 0.5), found(20, 10, 45, 40, 0.6)
    assert merged([left, right], [True, True]) == [right]


def test_empty_masks_and_no_results_are_no_error() -> None:
    assert merged([], []) == []
    empty = [found(10, 10, 0, 0, 0.5), found(10, 10, 0, 0, 0.4)]
    assert len(merged(empty, [False, False])) == 2
