"""Exact coverage: which fraction of each cell of a grid lies inside polygons.

Two steps, both over all boxes at once: `outlines` turns an instance's polygons into the directed edges of the
region that they cover together, and `coverage` integrates these edges over the cells. Polygons that cross themselves
so often that their outline would not fit in memory are integrated along scan lines instead (`scanned_coverage`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from maskloss.masks.encoded import AxisMap, FloatArray, IntArray, expanded

#: Rounds of cutting edges where they cross, each of which parts every crossing pair that is adjacent.
_MOST_ROUNDS = 100
#: Pieces of one instance's edges. A simple polygon of a thousand points has some thousand, one whose points are
#: shuffled would have a third of its points cubed.
_MOST_PIECES = 2**18
#: Edges of all boxes that are cut at the rows of the grid at once, and of the pieces the distances to the grid's lines.
_EDGES_AT_ONCE = 2**16
_DISTANCES_AT_ONCE = 2**21
#: Scan lines in a row of cells, for polygons beyond that.
_SCAN_LINES = 64
#: Crossings of scan lines with edges that are held at once.
_CROSSINGS_AT_ONCE = 2**21


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


def polygon_coverage(
    instances: Sequence[Sequence[FloatArray]],
    of_box: IntArray,
    boxes: FloatArray,
    size: int,
    x_map: AxisMap,
    y_map: AxisMap,
) -> Tensor:
    """Return the fraction of each cell of boxes that lies inside of an instance.

    Args:
        instances: each instance's polygons, (V, 2) xy; at least one.
        of_box: (P,) the instance of each box.
        boxes: (P, 4), xyxy, x2 > x1 and y2 > y1.
        size: M.
        x_map: from the polygons' x to the boxes'.
        y_map: from the polygons' y to the boxes'.

    Returns:
        (P, M, M) float32 in [0, 1]. Exact but for rounding; of polygons that cross themselves some hundred thousand
        times, off by some 1e-3 where a boundary runs.
    """
    edges, crowded = outlines(instances)
    covered = coverage(edges.mapped(x_map, y_map), of_box, boxes, size)
    for instance in crowded:
        scale, shift = np.array([[x_map.scale, y_map.scale], [x_map.shift, y_map.shift]])
        polygons = [polygon * scale + shift for polygon in instances[instance]]
        for box in np.nonzero(of_box == instance)[0]:
            covered[box] = scanned_coverage(polygons, boxes[box], size)
    return covered


def union_area(polygons: Sequence[FloatArray]) -> float:
    """Return the area of the region that polygons cover together.

    Args:
        polygons: (V, 2) xy each, in px; of one that crosses itself what it surrounds an odd number of times counts.

    Returns:
        In px², to the accuracy of `polygon_coverage`.

    Example:
        >>> square = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]])
        >>> union_area([square, square + 1])
        7.0
    """
    edges, crowded = outlines([list(polygons)])
    if crowded:
        points = np.concatenate(list(polygons))
        low, high = points.min(axis=0), points.max(axis=0)
        size = 64
        covered = scanned_coverage(polygons, np.concatenate([low, high]), size)
        return float(covered.double().mean()) * float((high - low).prod())
    height = edges.end[:, 1] - edges.start[:, 1]
    return abs(float((height * (edges.start[:, 0] + edges.end[:, 0])).sum())) / 2


def outlines(instances: Sequence[Sequence[FloatArray]]) -> tuple[Edges, list[int]]:
    """Find the outline of each instance, the union of its polygons.

    A point is inside a polygon that crosses itself when it is surrounded an odd number of times, as
    pycocotools fills it. Level edges are left out: they bound no area between two heights.

    The plane is cut into strips at the height of every vertex, and of every crossing. Within a strip, edges
    from left to right are in one order, and going along it an edge belongs to the outline where the number of
    polygons around changes from or to none.

    Args:
        instances: each instance's polygons, (V, 2) xy; at least one.

    Returns:
        The edges; and which instances were left out of them, because cutting their edges gives too many pieces.
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

    heights, owners = np.concatenate([top[:, 1], bottom[:, 1]]), np.tile(instance, 2)
    crowded: list[int] = []
    for _ in range(_MOST_ROUNDS):
        if not len(top):
            return Edges(top, bottom, instance), crowded
        levels = _Levels.of(len(top), heights, owners)
        pieces_by_instance = np.bincount(instance, levels.last - levels.first, len(instances))
        if (pieces_by_instance > _MOST_PIECES).any():
            too_many = np.nonzero(pieces_by_instance > _MOST_PIECES)[0]
            crowded += too_many.tolist()
            kept = ~np.isin(instance, too_many)
            top, bottom, polygon, instance = top[kept], bottom[kept], polygon[kept], instance[kept]
            kept = ~np.isin(owners, too_many)
            heights, owners = heights[kept], owners[kept]
            continue
        if pieces_by_instance.sum() > _MOST_PIECES:
            # Too many together; each alone is not.
            middle = len(instances) // 2
            (first, of_first), (second, of_second) = (
                outlines(instances[:middle]),
                outlines(instances[middle:]),
            )
            both = Edges(
                np.concatenate([first.start, second.start]),
                np.concatenate([first.end, second.end]),
                np.concatenate([first.instance, second.instance + middle]),
            )
            return both, of_first + [middle + number for number in of_second]
        pieces = _Pieces.of(top, bottom, polygon, instance, levels)
        crossings, of_instance = pieces.crossings()
        if not len(crossings):
            break
        heights, owners = np.concatenate([heights, crossings]), np.concatenate([owners, of_instance])
    return pieces.outline(top, bottom, instance), crowded


@dataclass(frozen=True)
class _Levels:
    """Heights at which the plane is cut, of all instances one after another.

    Attributes:
        heights: (L,) rising within an instance; strip s lies between levels s and s + 1.
        first: (E,) the level at which each edge begins.
        last: (E,) the level at which it ends.
    """

    heights: FloatArray
    first: IntArray
    last: IntArray

    @classmethod
    def of(cls, num_edges: int, heights: FloatArray, owners: IntArray) -> _Levels:
        """Sort heights, of which the first are the edges' tops and the next their bottoms, by instance."""
        order = np.lexsort((heights, owners))
        heights, owners = heights[order], owners[order]
        new = np.concatenate([[True], (np.diff(heights) > 0) | (np.diff(owners) > 0)])
        rank = np.empty(len(order), np.int64)
        rank[order] = new.cumsum() - 1
        return cls(heights[new], rank[:num_edges], rank[num_edges : 2 * num_edges])


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
        levels: _Levels,
    ) -> _Pieces:
        edge, step = expanded(levels.last - levels.first)
        strip = levels.first[edge] + step
        ends = []
        for level in (levels.heights[strip], levels.heights[strip + 1]):
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
    covered = torch.empty((len(boxes), size, size), dtype=torch.float32)
    for begin, end in pairwise([0, *_group_ends(counts)]):
        covered[begin:end] = _coverage(edges, first[begin:end], counts[begin:end], boxes[begin:end], size)
    return covered


def _group_ends(counts: IntArray) -> Iterator[int]:
    """Yield the end of each group of boxes whose edges are integrated together."""
    total = 0
    for box, count in enumerate(counts.tolist()):
        if total and total + count > _EDGES_AT_ONCE:
            yield box
            total = 0
        total += count
    yield len(counts)


def _coverage(edges: Edges, first: IntArray, counts: IntArray, boxes: FloatArray, size: int) -> Tensor:
    """Do what `coverage` does for boxes that have so many edges each from a first one on."""
    boxes_of_edges, step = expanded(counts)
    edges_of_boxes = first[boxes_of_edges] + step
    left_of = torch.zeros((len(boxes) * size, size + 1), dtype=torch.float64)
    for part in range(0, len(edges_of_boxes), _EDGES_AT_ONCE):
        chunk = slice(part, part + _EDGES_AT_ONCE)
        _add_areas(left_of, edges, edges_of_boxes[chunk], boxes_of_edges[chunk], boxes, size)
    covered = left_of.diff(dim=1).reshape(len(boxes), size, size)
    return covered.clamp(0, 1).float()


def _add_areas(
    left_of: Tensor, edges: Edges, edge: IntArray, box: IntArray, boxes: FloatArray, size: int
) -> None:
    """Add to each row of each box, (P * M, M + 1), what pairs of an edge and a box bound to the left of its lines."""
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
    at_once = max(_DISTANCES_AT_ONCE // len(lines), 1)
    for part in range(0, len(piece), at_once):
        chunk = slice(part, part + at_once)
        x_start, x_end, height = x_from[chunk, None], x_to[chunk, None], (y_to - y_from)[chunk, None]
        from_left = np.maximum(lines - x_start, 0)  # (pieces, M + 1)
        to_left = np.maximum(lines - x_end, 0)
        # The mean of max(k - x, 0) is that of its ends, times the share of the piece that is left of the line.
        width = x_start - x_end
        steep = np.abs(width) < 1e-9
        share = np.where(steep, 1.0, (to_left - from_left) / np.where(steep, 1.0, width))
        area = height * (from_left + to_left) / 2 * share
        of_row = box[piece[chunk]] * size + row[chunk]
        left_of.index_add_(0, torch.from_numpy(of_row), torch.from_numpy(area))


def scanned_coverage(polygons: Sequence[FloatArray], box: FloatArray, size: int) -> Tensor:
    """Integrate polygons over the cells of one box along scan lines, in memory that does not grow with crossings.

    Along a line the covered stretches are exact; across lines it is the midpoint rule.

    Args:
        polygons: one instance's, (V, 2) xy.
        box: (4,), xyxy, x2 > x1 and y2 > y1.
        size: M.

    Returns:
        (M, M) float32 in [0, 1].
    """
    scale = size / (box[2:] - box[:2])
    starts, ends, owners = [], [], []
    for number, polygon in enumerate(polygons):
        points = (polygon - box[:2]) * scale
        starts.append(points)
        ends.append(np.roll(points, -1, axis=0))
        owners.append(np.full(len(points), number))
    start, end, owner = np.concatenate(starts), np.concatenate(ends), np.concatenate(owners)
    y_low, y_high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    kept = (y_high > y_low) & (y_high > 0) & (y_low < size)
    start, end, owner, y_low, y_high = start[kept], end[kept], owner[kept], y_low[kept], y_high[kept]
    slope = (end[:, 0] - start[:, 0]) / (end[:, 1] - start[:, 1])
    lines = (np.arange(size * _SCAN_LINES) + 0.5) / _SCAN_LINES
    # Of each cell, the part of it to the right of the crossings in it, and how many crossings it has.
    right_of, crossings = np.zeros(size * size), np.zeros(size * size)
    at_once = max(_CROSSINGS_AT_ONCE // max(len(start), 1), 1)
    for chunk in range(0, len(lines), at_once):
        y = lines[chunk : chunk + at_once, None]
        line, edge = np.nonzero((y_low <= y) & (y < y_high))
        x = start[edge, 0] + (y[line, 0] - start[edge, 1]) * slope[edge]
        # By turns a polygon is entered and left; inside is where at least one has been entered.
        order = np.lexsort((x, owner[edge], line))
        turn = np.empty(len(order), np.int64)
        turn[order] = _turns(line[order], owner[edge][order])
        order = np.lexsort((x, line))
        around = turn[order].cumsum()
        entered = (around == 1) & (turn[order] == 1)
        left = (around == 0) & (turn[order] == -1)
        bound = order[(entered | left) & (x[order] < size)]
        position = np.maximum(x[bound], 0)
        column = position.astype(np.int64)
        cell = (line[bound] + chunk) // _SCAN_LINES * size + column
        right_of += np.bincount(cell, turn[bound] * (column + 1 - position), size * size)
        crossings += np.bincount(cell, turn[bound], size * size)
    # Cells further to the right lie behind the crossing wholly.
    before = crossings.reshape(size, size).cumsum(axis=1) - crossings.reshape(size, size)
    covered = (right_of.reshape(size, size) + before) / _SCAN_LINES
    return torch.from_numpy(covered).clamp(0, 1).float()


def _turns(line: IntArray, owner: IntArray) -> IntArray:
    """Give 1 and -1 by turns to what is sorted by line and owner, beginning with 1 in each."""
    new = (
        np.concatenate([[True], (np.diff(line) != 0) | (np.diff(owner) != 0)])
        if len(line)
        else np.empty(0, bool)
    )
    begun = np.nonzero(new)[0]
    place = np.arange(len(line)) - np.repeat(begun, np.diff([*begun, len(line)]))
    turns: IntArray = 1 - 2 * (place % 2)
    return turns
