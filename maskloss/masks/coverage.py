"""Exact coverage: which fraction of each cell of a grid lies inside polygons.

Two steps, both over all boxes at once: `outlines` turns an instance's polygons into the directed edges of the
region that they cover together, and `coverage` integrates these edges over the cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskloss.masks.encoded import AxisMap, FloatArray, IntArray, expanded

#: Rounds of cutting edges where they cross, each of which parts every crossing pair that is adjacent.
_MOST_ROUNDS = 100


@dataclass(frozen=True)
class Edges:
    """Directed edges of the regions of G instances: with the region on one and the same side of each.

    Attributes:
        start: (E, 2) xy.
        end: (E, 2) xy.
        instance: (E,) rising, in [0, G).
    """

    start: FloatArray
    end: FloatArray
    instance: IntArray

    def mapped(self, x_map: AxisMap, y_map: AxisMap) -> Edges:
        """Map the plane; where that mirrors it, edges turn round, for the region to stay on its side."""
        scale, shift = np.array([[x_map.scale, y_map.scale], [x_map.shift, y_map.shift]])
        start, end = self.start * scale + shift, self.end * scale + shift
        return Edges(end, start, self.instance) if scale.prod() < 0 else Edges(start, end, self.instance)


def outlines(instances: Sequence[Sequence[FloatArray]]) -> Edges:
    """Find the outline of each instance, the union of its polygons.

    A point is inside a polygon that crosses itself when it is surrounded an odd number of times, as
    pycocotools fills it. Level edges are left out: they bound no area between two heights.

    The plane is cut into strips at the height of every vertex, and of every crossing. Within a strip, edges
    from left to right are in one order, and going along it an edge belongs to the outline where the number of
    polygons around changes from or to none.

    Args:
        instances: each instance's polygons, (V, 2) xy; at least one.
    """
    polygons = [polygon for instance in instances for polygon in instance]
    points = np.concatenate(polygons)
    lengths = np.array([len(polygon) for polygon in polygons])
    polygon = np.repeat(np.arange(len(polygons)), lengths)
    instance = np.repeat(np.arange(len(instances)), [len(instance) for instance in instances])[polygon]
    following = np.arange(1, len(points) + 1)
    following[lengths.cumsum() - 1] = lengths.cumsum() - lengths
    upward = points[following, 1] > points[:, 1]
    top = np.where(upward[:, None], points, points[following])
    bottom = np.where(upward[:, None], points[following], points)
    kept = bottom[:, 1] > top[:, 1]
    top, bottom, polygon, instance = top[kept], bottom[kept], polygon[kept], instance[kept]
    if not len(top):
        return Edges(top, bottom, instance)

    heights, owners = np.concatenate([top[:, 1], bottom[:, 1]]), np.tile(instance, 2)
    for _ in range(_MOST_ROUNDS):
        pieces = _Pieces.of(top, bottom, polygon, instance, heights, owners)
        crossings, of_instance = pieces.crossings()
        if not len(crossings):
            break
        heights, owners = np.concatenate([heights, crossings]), np.concatenate([owners, of_instance])
    return pieces.outline(top, bottom, instance)


@dataclass(frozen=True)
class _Pieces:
    """Edges cut at the heights of their instance, by strip and, within it, from left to right.

    Attributes:
        edge: (B,) which edge it is a piece of.
        polygon: (B,) of the edge.
        strip: (B,) which strip it spans; strips are of one instance.
        low: (B, 2) its upper end, with the smaller y.
        high: (B, 2) its lower end.
        instance: (B,).
    """

    edge: IntArray
    polygon: IntArray
    strip: IntArray
    low: FloatArray
    high: FloatArray
    instance: IntArray

    @classmethod
    def of(
        cls,
        top: FloatArray,
        bottom: FloatArray,
        polygon: IntArray,
        instance: IntArray,
        heights: FloatArray,
        owners: IntArray,
    ) -> _Pieces:
        order = np.lexsort((heights, owners))
        heights, owners = heights[order], owners[order]
        new = np.concatenate([[True], (np.diff(heights) > 0) | (np.diff(owners) > 0)])
        levels = heights[new]  # strip s lies between levels s and s + 1
        rank = np.empty(len(order), np.int64)
        rank[order] = new.cumsum() - 1
        first, last = rank[: len(top)], rank[len(top) : 2 * len(top)]
        edge, step = expanded(last - first)
        strip = first[edge] + step
        ends = []
        for level in (levels[strip], levels[strip + 1]):
            share = (level - top[edge, 1]) / (bottom[edge, 1] - top[edge, 1])
            x = top[edge, 0] + share * (bottom[edge, 0] - top[edge, 0])
            ends.append(np.stack([x, level], axis=1))
        middle = ends[0][:, 0] + ends[1][:, 0]
        order = np.lexsort((middle, strip))
        edge = edge[order]
        return cls(edge, polygon[edge], strip[order], ends[0][order], ends[1][order], instance[edge])

    def crossings(self) -> tuple[FloatArray, IntArray]:
        """Heights at which neighbours cross inside their strip, and their instances."""
        left = np.nonzero(np.diff(self.strip) == 0)[0]
        above = self.low[left + 1, 0] - self.low[left, 0]
        below = self.high[left + 1, 0] - self.high[left, 0]
        # Less than this is rounding.
        slack = 1e-9 * (1 + np.abs(self.low[left, 0]) + np.abs(self.high[left, 0]))
        crossed = (above < -slack) | (below < -slack)
        left, above, below = left[crossed], above[crossed], below[crossed]
        y_low, y_high = self.low[left, 1], self.high[left, 1]
        height = y_low + above / (above - below) * (y_high - y_low)
        inside = (height > y_low) & (height < y_high)
        return height[inside], self.instance[left][inside]

    def outline(self, top: FloatArray, bottom: FloatArray, instance: IntArray) -> Edges:
        """Keep the pieces between inside and outside, directed; an edge that is kept whole as one."""
        # By turns a polygon's pieces from left to right enter and leave it.
        turn = 1 - 2 * (np.arange(len(self.edge)) % 2)
        if np.any((np.diff(self.polygon) != 0) & (np.diff(self.strip) == 0)):
            # More polygons than one in a strip: each takes its own turns.
            by_polygon = np.lexsort((np.arange(len(self.edge)), self.polygon, self.strip))
            turn[by_polygon] = turn.copy()
        around = turn.cumsum()
        direction = np.where((around == 0) | (around == turn), turn, 0)
        total = np.bincount(self.edge, direction, len(top)).astype(np.int64)
        whole = np.abs(total) == np.bincount(self.edge, minlength=len(top))
        cut = (direction != 0) & ~whole[self.edge]
        start = np.concatenate([top[whole], self.low[cut]])
        end = np.concatenate([bottom[whole], self.high[cut]])
        sign = np.concatenate([total[whole], direction[cut]])
        owner = np.concatenate([instance[whole], self.instance[cut]])
        order = np.argsort(owner, kind="stable")
        start, end, downward = start[order], end[order], (sign[order] > 0)[:, None]
        return Edges(np.where(downward, start, end), np.where(downward, end, start), owner[order])


def coverage(edges: Edges, instances: IntArray, boxes: FloatArray, size: int) -> Tensor:
    """Integrate instances' outlines over the cells of boxes.

    By Green's theorem the area of a region to the left of a line x = k, within a row, is the sum over the
    row's pieces of edges of their height times the mean of max(k - x, 0) along the piece, with the height's
    sign. Differences between neighbouring lines are the cells' areas.

    Args:
        edges: of all instances.
        instances: (P,) the instance of each box.
        boxes: (P, 4), xyxy, x2 > x1 and y2 > y1.
        size: M.

    Returns:
        (P, M, M) float32 in [0, 1].
    """
    first = np.searchsorted(edges.instance, instances, side="left")
    counts = np.searchsorted(edges.instance, instances, side="right") - first
    box, step = expanded(counts)
    edge = first[box] + step
    low, scale = boxes[:, :2], size / (boxes[:, 2:] - boxes[:, :2])
    start, end = ((points[edge] - low[box]) * scale[box] for points in (edges.start, edges.end))

    # Each edge is cut at the rows of the grid.
    y_low, y_high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    first_row = np.clip(np.floor(y_low), 0, size).astype(np.int64)
    last_row = np.clip(np.ceil(y_high), 0, size).astype(np.int64)
    # An edge to the right of the grid has nothing of it on its right, and a level one bounds no area.
    counted = (np.minimum(start[:, 0], end[:, 0]) < size) & (y_high - y_low > 1e-12)
    piece, step = expanded(np.where(counted, last_row - first_row, 0))
    row = first_row[piece] + step
    start, delta = start[piece], (end - start)[piece]
    y_from = np.clip(start[:, 1], row, row + 1)
    y_to = np.clip(start[:, 1] + delta[:, 1], row, row + 1)
    slope = delta[:, 0] / delta[:, 1]
    x_from = start[:, 0] + (y_from - start[:, 1]) * slope
    x_to = start[:, 0] + (y_to - start[:, 1]) * slope

    lines = np.arange(size + 1.0)
    from_left = np.maximum(lines - x_from[:, None], 0)  # (pieces, M + 1)
    to_left = np.maximum(lines - x_to[:, None], 0)
    # The mean of max(k - x, 0) is that of its ends, times the share of the piece that is left of the line.
    width = (x_from - x_to)[:, None]
    steep = np.abs(width) < 1e-9
    share = np.where(steep, 1.0, (to_left - from_left) / np.where(steep, 1.0, width))
    area = (y_to - y_from)[:, None] * (from_left + to_left) / 2 * share
    left_of = torch.zeros((len(boxes) * size, size + 1), dtype=torch.float64)
    left_of.index_add_(0, torch.from_numpy(box[piece] * size + row), torch.from_numpy(area))
    covered = left_of.diff(dim=1).reshape(len(boxes), size, size)
    return covered.clamp(0, 1).float()


def union_area(polygons: Sequence[FloatArray]) -> float:
    """Area in px² of the union of polygons, (V, 2) xy each; even-odd inside a polygon that crosses itself."""
    edges = outlines([list(polygons)])
    height = edges.end[:, 1] - edges.start[:, 1]
    return abs(float((height * (edges.start[:, 0] + edges.end[:, 0])).sum())) / 2
