"""Point targets against shapely-like plain loops, pycocotools' masks and torch's own bilinear sampling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.path import Path as Outline
from pycocotools import mask as coco_mask
from torch import Tensor

from maskloss import EncodedMasks
from maskloss.masks import point_targets as module
from maskloss.masks.point_targets import bitmaps_at_points, point_targets

HEIGHT, WIDTH = 40, 50


def star(x: float, y: float, outer: float, inner: float, count: int = 5) -> list[float]:
    angles = np.arange(2 * count) * math.pi / count + 0.1
    radius = np.where(np.arange(2 * count) % 2, inner, outer)
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1).reshape(-1).tolist()


STAR, OTHER = star(20.3, 18.7, 15.0, 6.0), star(38.1, 28.2, 9.0, 4.0, 7)
SQUARE = [30.0, 5.0, 45.0, 5.0, 45.0, 15.0, 30.0, 15.0]


def random_points(rows: int, count: int = 300, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, count, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])


def by_matplotlib(polygons: list[list[float]], points: Tensor) -> Any:
    inside = [Outline(np.reshape(polygon, (-1, 2))).contains_points(points.numpy()) for polygon in polygons]
    return torch.from_numpy(np.any(inside, axis=0)).float()


def test_polygons_by_another_library():
    instances = [[STAR], [OTHER, SQUARE], [SQUARE]]
    masks = EncodedMasks(instances, HEIGHT, WIDTH)
    idxs = torch.tensor([1, 0, 2, 1])
    points = random_points(4)
    found = point_targets(masks, points, idxs)
    assert found.dtype == torch.float32
    for row, index in enumerate(idxs.tolist()):
        expected = by_matplotlib(instances[index], points[row])
        assert torch.equal(found[row], expected)
        assert 0 < expected.mean() < 1


def test_a_polygon_that_crosses_itself_is_filled_by_the_even_odd_rule():
    angles = np.arange(5) * 4 * math.pi / 5
    pentagram = np.stack([25 + 18 * np.cos(angles), 20 + 18 * np.sin(angles)], axis=1).reshape(-1).tolist()
    masks = EncodedMasks([[pentagram]], HEIGHT, WIDTH)
    centers = torch.stack(
        torch.meshgrid(torch.arange(WIDTH) + 0.5, torch.arange(HEIGHT) + 0.5, indexing="xy"), dim=-1
    )
    found = point_targets(masks, centers.reshape(1, -1, 2), torch.tensor([0])).reshape(HEIGHT, WIDTH)
    bitmap = torch.from_numpy(
        coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([pentagram], HEIGHT, WIDTH))).astype(
            np.float32
        )
    )
    assert (found != bitmap).float().mean() < 0.02
    assert found[20, 25] == 0


def test_polygons_move_with_the_image():
    masks = EncodedMasks([[STAR]], HEIGHT, WIDTH)
    points = random_points(1)
    idxs = torch.tensor([0])
    expected = point_targets(masks, points, idxs)
    resized = masks.resize(2 * HEIGHT, 3 * WIDTH)
    assert torch.equal(point_targets(resized, points * torch.tensor([3.0, 2.0]), idxs), expected)
    flipped = torch.stack([WIDTH - points[..., 0], points[..., 1]], dim=-1)
    agreement = point_targets(masks.horizontal_flip(), flipped, idxs) == expected
    assert agreement.float().mean() > 0.995  # points within rounding of an edge may change sides


def test_bitmaps_by_torchs_own_sampling():
    generator = torch.Generator().manual_seed(3)
    masks = torch.rand(3, HEIGHT, WIDTH, generator=generator) > 0.5
    idxs = torch.tensor([2, 0])
    points = random_points(2) * 1.2 - 4  # some outside the image
    found = bitmaps_at_points(masks, points, idxs)
    grid = 2 * points / torch.tensor([WIDTH, HEIGHT]) - 1
    expected = F.grid_sample(masks[idxs, None].float(), grid[:, :, None], align_corners=False)[:, 0, :, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert torch.equal(point_targets(masks.to(torch.uint8), points, idxs), found)


def test_rles_are_sampled_as_their_bitmaps():
    bitmap = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    bitmap[5:20, 8:30] = 1
    rle = coco_mask.encode(np.asfortranarray(bitmap))
    masks = EncodedMasks([[STAR], {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}], HEIGHT, WIDTH)
    points = random_points(3)
    found = point_targets(masks, points, torch.tensor([1, 0, 1]))
    expected = bitmaps_at_points(torch.from_numpy(bitmap)[None], points[[0, 2]], torch.tensor([0, 0]))
    torch.testing.assert_close(found[[0, 2]], expected)
    assert torch.equal(found[1], by_matplotlib([STAR], points[1]))


def test_chunks_change_nothing(monkeypatch):
    masks = EncodedMasks([[OTHER, SQUARE], [STAR]], HEIGHT, WIDTH)
    points, idxs = random_points(6), torch.tensor([0, 1, 0, 1, 1, 0])
    expected = point_targets(masks, points, idxs)
    monkeypatch.setattr(module, "_PAIRS_AT_ONCE", 1)
    assert torch.equal(point_targets(masks, points, idxs), expected)


def test_no_points_and_no_rows():
    masks = EncodedMasks([[STAR]], HEIGHT, WIDTH)
    assert point_targets(masks, torch.zeros(0, 5, 2), torch.zeros(0, dtype=torch.int64)).shape == (0, 5)
    assert point_targets(masks, torch.zeros(1, 0, 2), torch.tensor([0])).shape == (1, 0)


def test_an_object_without_a_mask_raises():
    with pytest.raises(ValueError, match="has no mask"):
        point_targets(EncodedMasks([None], HEIGHT, WIDTH), torch.zeros(1, 1, 2), torch.tensor([0]))


def test_one_long_polygon_among_short_ones_changes_nothing(monkeypatch):
    """Polygons are padded to the longest of a chunk."""
    angles = np.linspace(0, 2 * math.pi, 500, endpoint=False)
    circle = np.stack([25 + 18 * np.cos(angles), 20 + 15 * np.sin(angles)], axis=1)
    instances = [[SQUARE], [circle.ravel().tolist(), SQUARE], [STAR]]
    points = random_points(3)
    monkeypatch.setattr(module, "_PAIRS_AT_ONCE", 2 * points.shape[1] * 501)
    found = point_targets(EncodedMasks(instances, HEIGHT, WIDTH), points, torch.arange(3))
    for row, polygons in enumerate(instances):
        assert torch.equal(found[row], by_matplotlib(polygons, points[row]))


@pytest.mark.parametrize(
    "masks", [EncodedMasks([[SQUARE]] * 2, HEIGHT, WIDTH), torch.ones(2, HEIGHT, WIDTH).bool()]
)
@pytest.mark.parametrize(
    ("shape", "matched_idxs", "message"),
    [
        ((3, 1, 2), [0], r"got \(3, 1, 2\) and \(1,\)"),
        ((1, 1, 3), [0], r"got \(1, 1, 3\)"),
        ((1, 2), [0], r"got \(1, 2\)"),
        ((1, 1, 2), [-1], r"matched_idxs must be in \[0, 2\), got -1 to -1"),
        ((2, 1, 2), [0, 2], "got 0 to 2"),
    ],
)
def test_points_and_indices_that_do_not_fit_are_refused(masks, shape, matched_idxs, message):
    with pytest.raises(ValueError, match=message):
        point_targets(masks, torch.ones(shape), torch.tensor(matched_idxs))
