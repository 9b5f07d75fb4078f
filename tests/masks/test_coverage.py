"""Areas of polygons that cross themselves and each other, including too many crossings for an outline."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskloss.masks import coverage as coverage_module
from maskloss.masks.coverage import outlines, polygon_coverage, scanned_coverage, union_area
from maskloss.masks.encoded import AxisMap
from tests import reference

BOX = [0.0, 0.0, 10.0, 10.0]


def shuffled(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 11, (count, 2))


def square(x: float, y: float, side: float) -> np.ndarray:
    return np.array([[x, y], [x + side, y], [x + side, y + side], [x, y + side]])


# Areas by hand.

#: Radius of the pentagon inside of a pentagram of radius 1.
INNER = math.cos(math.radians(72)) / math.cos(math.radians(36))


@pytest.mark.parametrize(
    ("polygons", "area"),
    [
        ([square(0, 0, 2)], 4.0),
        ([square(0, 0, 2)[::-1]], 4.0),
        ([square(0, 0, 2), square(5, 5, 1)], 5.0),
        ([square(0, 0, 2), square(1, 1, 2)], 7.0),
        ([square(0, 0, 4), square(1, 1, 2)], 16.0),  # COCO has no holes
        ([square(0, 0, 2), square(0, 0, 2)], 4.0),
        ([square(0, 0, 2), square(0, 0, 2)[::-1]], 4.0),
        # A bow tie: two triangles of base 4 and height 2, whose signed areas cancel.
        ([np.array([[0.0, 0.0], [4.0, 4.0], [4.0, 0.0], [0.0, 4.0]])], 8.0),
        # A pentagram of radius 1: the inner pentagon is surrounded twice, so it is outside.
        (
            [np.array([[math.cos(a), math.sin(a)] for a in 2 * math.pi * np.array([0, 2, 4, 1, 3]) / 5])],
            5 * INNER * math.sin(math.radians(36)) - 2.5 * INNER**2 * math.sin(math.radians(72)),
        ),
        ([np.array([[0.0, 0.0], [4.0, 4.0], [2.0, 2.0]])], 0.0),
    ],
)
def test_areas_by_hand(polygons, area):
    assert union_area(polygons) == pytest.approx(area, abs=1e-9)


@given(st.integers(0, 10_000), st.integers(3, 12), st.integers(1, 3))
def test_areas_agree_with_a_fine_raster(seed, count, polygons):
    arrays = [shuffled(count, seed + i) for i in range(polygons)]
    box = [-1.0, -1.0, 11.0, 11.0]
    expected = float(reference.supersampled_coverage(arrays, box, 12, 12).mean()) * 144
    assert union_area(arrays) == pytest.approx(expected, abs=1.5)


# Scan lines.


@pytest.mark.parametrize("count", [5, 20, 60])
def test_scan_lines_agree_with_the_outline(count):
    polygon = shuffled(count)
    box = np.array(BOX)
    exact = polygon_coverage([[polygon]], np.array([0]), box[None], 14, AxisMap(), AxisMap())[0]
    scanned = scanned_coverage([polygon], box, 14)
    assert (scanned - exact).abs().max() < 0.02
    assert (scanned - exact).abs().mean() < 1e-3


def test_scan_lines_take_the_union_of_polygons():
    polygons = [square(1, 1, 5), square(3, 3, 5), shuffled(9)]
    box = np.array([-2.0, 0.5, 9.0, 8.0])
    exact = polygon_coverage([polygons], np.array([0]), box[None], 11, AxisMap(), AxisMap())[0]
    assert (scanned_coverage(polygons, box, 11) - exact).abs().max() < 0.02


def test_scan_lines_of_a_square_by_hand():
    covered = scanned_coverage([square(2.5, 0.0, 5.0)], np.array(BOX), 10)
    expected = torch.zeros(10, 10)
    expected[:5, 2:8] = torch.tensor([0.5, 1, 1, 1, 1, 0.5])
    assert torch.allclose(covered, expected)
    # Polygons around the box, and to each side of it.
    assert torch.equal(scanned_coverage([square(-9, -3, 30)], np.array(BOX), 3), torch.ones(3, 3))
    for x, y in ((-9, 0), (12, 0), (0, 12), (0, -9)):
        assert not scanned_coverage([square(x, y, 5)], np.array(BOX), 3).any()


def test_scan_lines_in_chunks_give_the_same_result(monkeypatch):
    expected = scanned_coverage([shuffled(30)], np.array(BOX), 7)
    monkeypatch.setattr(coverage_module, "_CROSSINGS_AT_ONCE", 31)
    assert torch.allclose(scanned_coverage([shuffled(30)], np.array(BOX), 7), expected)


def test_only_instances_with_too_many_crossings_use_scan_lines(monkeypatch):
    instances = [[square(1, 2, 4)], [shuffled(40)], [square(3, 3, 3), square(4, 4, 5)]]
    of_box = np.array([1, 0, 2, 1])
    boxes = np.array([BOX, [0.0, 1.0, 6.0, 9.0], BOX, [2.0, 2.0, 7.0, 5.0]])
    x_map, y_map = AxisMap(-0.5, 9.0), AxisMap(0.75, 1.0)
    expected = polygon_coverage(instances, of_box, boxes, 9, x_map, y_map)
    area = union_area(instances[1])
    monkeypatch.setattr(coverage_module, "_MOST_PIECES", 500)
    assert outlines(instances)[1] == [1]
    found = polygon_coverage(instances, of_box, boxes, 9, x_map, y_map)
    assert torch.equal(found[1:3], expected[1:3])
    assert (found - expected).abs().max() < 0.02
    assert not torch.equal(found[0], expected[0])
    assert union_area(instances[1]) == pytest.approx(area, rel=0.01)


def test_points_in_random_order_take_little_memory():
    # Without a limit on the number of pieces, 400 points took 38 s and 7 GB.
    edges, crowded = outlines([[shuffled(400)]])
    assert crowded == [0]
    assert len(edges.start) == 0
    assert union_area([shuffled(400)]) == pytest.approx(72, rel=0.2)  # about half of 12 x 12


def test_many_edges_in_many_boxes_are_integrated_in_groups(monkeypatch):
    polygon = 5 + 4 * np.stack([np.cos(np.arange(200) / 31.8), np.sin(np.arange(200) / 31.8)], axis=1)
    boxes = np.array([[0.1 * i, 0.0, 9.0, 10.0 - 0.2 * i] for i in range(8)])
    of_box = np.zeros(8, np.int64)
    expected = polygon_coverage([[polygon]], of_box, boxes, 6, AxisMap(), AxisMap())
    groups = []
    of_group = coverage_module._coverage
    monkeypatch.setattr(
        coverage_module, "_coverage", lambda *given: groups.append(len(given[3])) or of_group(*given)
    )
    monkeypatch.setattr(coverage_module, "_EDGES_AT_ONCE", 450)
    assert torch.equal(polygon_coverage([[polygon]], of_box, boxes, 6, AxisMap(), AxisMap()), expected)
    assert groups == [2, 2, 2, 2]  # 200 edges for each box


def test_edges_and_their_pieces_are_integrated_in_chunks(monkeypatch):
    points = np.array(
        [[i / 40, 9.0 if i % 2 else 1.0] for i in range(400)] + [[10.0, 9.5], [0.0, 9.5]]
    )  # a comb
    boxes = np.array([BOX, [1.0, 2.0, 9.0, 8.0]])
    expected = polygon_coverage([[points]], np.zeros(2, np.int64), boxes, 6, AxisMap(), AxisMap())
    x, y = points.T
    area = (
        abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
    )  # the shoelace formula: it does not cross itself
    assert expected[0].sum() * 100 / 36 == pytest.approx(area, rel=1e-5)
    monkeypatch.setattr(coverage_module, "_EDGES_AT_ONCE", 37)
    monkeypatch.setattr(coverage_module, "_DISTANCES_AT_ONCE", 101)
    found = polygon_coverage([[points]], np.zeros(2, np.int64), boxes, 6, AxisMap(), AxisMap())
    assert torch.equal(found, expected)


def test_instances_with_too_many_pieces_together_are_split_into_groups(monkeypatch):
    instances = [[square(1, 2, 4)], [shuffled(12)], [square(3, 3, 3), square(4, 4, 5)], [shuffled(10)]]
    of_box = np.array([1, 0, 2, 3, 1])
    boxes = np.tile(np.array([BOX]), (5, 1))
    expected = polygon_coverage(instances, of_box, boxes, 9, AxisMap(), AxisMap())
    calls = []
    outline = coverage_module.outlines
    monkeypatch.setattr(coverage_module, "outlines", lambda group: calls.append(len(group)) or outline(group))
    monkeypatch.setattr(coverage_module, "_MOST_PIECES", 125)
    found = polygon_coverage(instances, of_box, boxes, 9, AxisMap(), AxisMap())
    assert calls == [4, 2, 2]
    assert outline(instances)[1] == []
    assert torch.equal(found, expected)
