"""Exact coverage: the fraction of each grid cell that lies inside polygons.

Two steps, both for all boxes at once: `outlines` turns an instance's polygons into the directed edges of their
union, and `coverage` integrates these edges over the cells. If polygons cross themselves so often that the outline
would not fit in memory, `scanned_coverage` integrates them along scan lines instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from maskloss.masks.encoded import AxisMap, FloatArray, IntArray, expanded

#: Maximum rounds of cutting edges at their crossings. Each round separates all adjacent pairs that cross.
_MOST_ROUNDS = 100
#: Maximum pieces of one instance's edges. A simple polygon of a thousand points has a few thousand pieces, 300 blobs of
#: 40 points each have some hundred thousand, and a polygon of V points in random order has about (V / 3)**3.
_MOST_PIECES = 2**19
#: Chunk sizes: edges of all boxes that are cut at the grid's rows, and distances from pieces to the grid's lines.
_EDGES_AT_ONCE = 2**16
_DISTANCES_AT_ONCE = 2**21
#: Scan lines per row of cells, for instances with more pieces than `_MOST_PIECES`.
_SCAN_LINES = 64
#: Chunk size: crossings of scan lines with edges.
_CROSSINGS_AT_ONCE = 2**21


@dataclass(frozen=True)
class Edges:
    """Directed edges that bound the regions of G instances, each with the region on the same side.

    Attributes:
        start: (E, 2) xy.
        end: (E, 2) xy.
        instance: (E,) in [0, G), ascending.

    Example:
        >>> edges = Edges(np.array([[1.0, 0.0]]), np.array([[1.0, 4.0]]), np.array([0]))
        >>> edges.mapped(AxisMap(-1.0, 8.0), AxisMap()).start.tolist()
        [[7.0, 4.0]]
    """

    start: FloatArray
    end: FloatArray
    instance: IntArray

    def mapped(self, x_map: AxisMap, y_map: AxisMap) -> Edges:
        """Return the edges mapped to other coordinates; a mirroring map reverses them to keep the region's side."""
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
    """Compute the fraction of each box's cells that lies inside the box's instance.

    Args:
        instances: each instance's polygons, (V, 2) xy; at least one per instance.
        of_box: (P,) index of each box's instance.
        boxes: (P, 4), xyxy, x2 > x1 and y2 > y1.
        size: M.
        x_map: from the polygons' x to the boxes' x.
        y_map: from the polygons' y to the boxes' y.

    Returns:
        (P, M, M) float32 in [0, 1]. Exact up to rounding. Instances of several hundred polygons, or that cross
        themselves some hundred thousand times, are scanned along 64 lines per row of cells instead: the error is up to
        about 0.01 in cells on a boundary.

    Example:
        >>> square, box = np.array([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0], [0.0, 4.0]]), np.array([[0.0, 0.0, 4.0, 4.0]])
        >>> polygon_coverage([[square]], np.array([0]), box, 2, AxisMap(), AxisMap())
        tensor([[[1.0000, 0.5000],
                 [1.0000, 0.5000]]])
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
    """Return the area of the union of polygons.

    Args:
        polygons: (V, 2) xy each, in px. Self-crossing polygons are filled by the even-odd rule.

    Returns:
        Area in px², as accurate as `polygon_coverage`.

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
    """Compute the outline of each instance, the union of its polygons.

    Self-crossing polygons are filled by the even-odd rule, as pycocotools fills them. Horizontal edges are left
    out because they bound no area.

    The plane is cut into horizontal strips at the y of every vertex and every crossing. Within a strip, edges do not
    cross, so they have one order from left to right. In this order, an edge belongs to the outline if the number of
    polygons that contain the current point changes from or to zero there.

    Args:
        instances: each instance's polygons, (V, 2) xy; at least one per instance.

    Returns:
        The edges, and the indices of the instances that they leave out because cutting them makes too many pieces.

    Example:
        >>> edges, left_out = outlines([[np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])]])
        >>> edges.start.tolist(), edges.end.tolist(), left_out
        ([[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [])
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
            # Together they have too many pieces, but no instance has too many alone.
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
    """The y values at which the plane is cut, instance after instance.

    Attributes:
        heights: (L,) y of each level, ascending within an instance; strip s lies between levels s and s + 1.
        first: (E,) level at which each edge begins.
        last: (E,) level at which each edge ends.
    """

    heights: FloatArray
    first: IntArray
    last: IntArray

    @classmethod
    def of(cls, num_edges: int, heights: FloatArray, owners: IntArray) -> _Levels:
        """Make the levels of E edges.

        Args:
            num_edges: E.
            heights: (K,) y of the E tops, then of the E bottoms, then of the crossings.
            owners: (K,) the instance of each.
        """
        order = np.lexsort((heights, owners))
        heights, owners = heights[order], owners[order]
        new = np.concatenate([[True], (np.diff(heights) > 0) | (np.diff(owners) > 0)])
        rank = np.empty(len(order), np.int64)
        rank[order] = new.cumsum() - 1
        return cls(heights[new], rank[:num_edges], rank[num_edges : 2 * num_edges])


@dataclass(frozen=True)
class _Pieces:
    """Edges cut at the levels of their instance, sorted by strip and, within a strip, from left to right.

    Attributes:
        edge: (B,) index of the edge that each piece was cut from.
        polygon: (B,) polygon of that edge.
        strip: (B,) strip that the piece spans; each strip belongs to one instance.
        low: (B, 2) end with the smaller y.
        high: (B, 2) end with the larger y.
        instance: (B,) instance of that edge.
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
        """Return the y at which adjacent pieces cross inside their strip, and the instance of each crossing."""
        left = np.nonzero(np.diff(self.strip) == 0)[0]
        above = self.low[left + 1, 0] - self.low[left, 0]
        below = self.high[left + 1, 0] - self.high[left, 0]
        # Smaller differences are rounding errors.
        slack = 1e-9 * (1 + np.abs(self.low[left, 0]) + np.abs(self.high[left, 0]))
        crossed = (above < -slack) | (below < -slack)
        left, above, below = left[crossed], above[crossed], below[crossed]
        y_low, y_high = self.low[left, 1], self.high[left, 1]
        height = y_low + above / (above - below) * (y_high - y_low)
        inside = (height > y_low) & (height < y_high)
        return height[inside], self.instance[left][inside]

    def outline(self, top: FloatArray, bottom: FloatArray, instance: IntArray) -> Edges:
        """Return the directed pieces between inside and outside; edges of which all pieces are kept stay uncut.

        Args:
            top: (E, 2) end of each edge with the smaller y.
            bottom: (E, 2) end of each edge with the larger y.
            instance: (E,) instance of each edge.
        """
        # From left to right, a polygon's pieces alternately enter (1) and leave (-1) it.
        turn = 1 - 2 * (np.arange(len(self.edge)) % 2)
        if np.any((np.diff(self.polygon) != 0) & (np.diff(self.strip) == 0)):
            # With several polygons in a strip, each alternates separately.
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
    """Integrate the outlines of instances over the cells of boxes.

    Green's theorem gives the area of a region to the left of a line x = k within a row of cells: sum, over the
    pieces of edges in the row, the piece's signed height times the mean of max(k - x, 0) along the piece. The
    differences between neighboring lines are the areas inside the cells.

    Args:
        edges: edges of all instances, from `outlines`.
        instances: (P,) index of each box's instance.
        boxes: (P, 4), xyxy, x2 > x1 and y2 > y1.
        size: M.

    Returns:
        (P, M, M) float32 in [0, 1].

    Example:
        >>> edges, _ = outlines([[np.array([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0], [0.0, 4.0]])]])
        >>> coverage(edges, np.array([0]), np.array([[0.0, 0.0, 4.0, 4.0]]), 2)
        tensor([[[1.0000, 0.5000],
                 [1.0000, 0.5000]]])
    """
    first = np.searchsorted(edges.instance, instances, side="left")
    counts = np.searchsorted(edges.instance, instances, side="right") - first
    covered = torch.empty((len(boxes), size, size), dtype=torch.float32)
    for begin, end in pairwise([0, *_group_ends(counts)]):
        covered[begin:end] = _coverage(edges, first[begin:end], counts[begin:end], boxes[begin:end], size)
    return covered


def _group_ends(counts: IntArray) -> Iterator[int]:
    """Yield the end index of each group of boxes whose edges are integrated together."""
    total = 0
    for box, count in enumerate(counts.tolist()):
        if total and total + count > _EDGES_AT_ONCE:
            yield box
            total = 0
        total += count
    yield len(counts)


def _coverage(edges: Edges, first: IntArray, counts: IntArray, boxes: FloatArray, size: int) -> Tensor:
    """Compute `coverage` of boxes P whose edges are `first[p]` to `first[p] + counts[p]`."""
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
    """Add the areas that edges bound to the left of each grid line, in place.

    Args:
        left_of: (P * M, M + 1), the area to the left of each of the M + 1 lines, in each row of each box.
        edges: edges of all instances.
        edge: (K,) index of the edge in each pair of an edge and a box.
        box: (K,) index of the box in each pair.
        boxes: (P, 4), xyxy.
        size: M.
    """
    low, scale = boxes[:, :2], size / (boxes[:, 2:] - boxes[:, :2])
    start, end = ((points[edge] - low[box]) * scale[box] for points in (edges.start, edges.end))

    # Cut each edge at the grid's rows.
    y_low, y_high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    first_row = np.clip(np.floor(y_low), 0, size).astype(np.int64)
    last_row = np.clip(np.ceil(y_high), 0, size).astype(np.int64)
    # Edges right of the grid, and horizontal edges, contribute no area.
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
        # Mean of max(k - x, 0) along the piece: the mean over its part left of the line, times that part's share.
        width = x_start - x_end
        steep = np.abs(width) < 1e-9
        share = np.where(steep, 1.0, (to_left - from_left) / np.where(steep, 1.0, width))
        area = height * (from_left + to_left) / 2 * share
        of_row = box[piece[chunk]] * size + row[chunk]
        left_of.index_add_(0, torch.from_numpy(of_row), torch.from_numpy(area))


def scanned_coverage(polygons: Sequence[FloatArray], box: FloatArray, size: int) -> Tensor:
    """Integrate polygons over the cells of one box along scan lines.

    Memory does not grow with the number of crossings. Integration is exact along each scan line, and uses the
    midpoint rule across lines.

    Args:
        polygons: polygons of one instance, (V, 2) xy.
        box: (4,), xyxy, x2 > x1 and y2 > y1.
        size: M.

    Returns:
        (M, M) float32 in [0, 1].

    Example:
        >>> square = np.array([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0], [0.0, 4.0]])
        >>> scanned_coverage([square], np.array([0.0, 0.0, 4.0, 4.0]), 2)
        tensor([[1.0000, 0.5000],
                [1.0000, 0.5000]])
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
    # Per cell: the signed width to the right of the crossings in it, and the signed number of crossings.
    right_of, crossings = np.zeros(size * size), np.zeros(size * size)
    at_once = max(_CROSSINGS_AT_ONCE // max(len(start), 1), 1)
    for chunk in range(0, len(lines), at_once):
        y = lines[chunk : chunk + at_once, None]
        line, edge = np.nonzero((y_low <= y) & (y < y_high))
        x = start[edge, 0] + (y[line, 0] - start[edge, 1]) * slope[edge]
        # Crossings alternately enter and leave a polygon; inside the union, at least one has been entered.
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
    # Cells further right lie entirely to the right of the crossing.
    before = crossings.reshape(size, size).cumsum(axis=1) - crossings.reshape(size, size)
    covered = (right_of.reshape(size, size) + before) / _SCAN_LINES
    return torch.from_numpy(covered).clamp(0, 1).float()


def _turns(line: IntArray, owner: IntArray) -> IntArray:
    """Return 1, -1, 1, ... within each run of equal (line, owner); both (K,), sorted by line, then by owner."""
    new = (
        np.concatenate([[True], (np.diff(line) != 0) | (np.diff(owner) != 0)])
        if len(line)
        else np.empty(0, bool)
    )
    begun = np.nonzero(new)[0]
    place = np.arange(len(line)) - np.repeat(begun, np.diff([*begun, len(line)]))
    turns: IntArray = 1 - 2 * (place % 2)
    return turns
