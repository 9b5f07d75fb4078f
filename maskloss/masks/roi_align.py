"""RoIAlign of one mask per box, as two small matrix products.

On an axis-aligned grid bilinear sampling is separable: a target is `rows @ crop @ columns.T`, where `rows` and
`columns` hold the weight of each pixel row and column in each cell. So only the crop is read or converted; no
float copy of a full-image mask is made. (On a GPU the products follow torch's TF32 setting, off by default.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from maskloss.masks.encoded import Runs

#: Boxes whose weights are held at once on a CPU, which takes their crops one by one.
_BOXES_AT_ONCE = 16
#: Pixels of the crops that a GPU takes at once, and how much larger padding to one size may make them.
_PIXELS_AT_ONCE = 2**24
_LARGEST_PADDING = 2.0


@dataclass(frozen=True)
class AxisSampling:
    """Where RoIAlign samples along one axis, for each of P boxes.

    The arithmetic follows RoIAlign step by step, in float32, so that every sample falls on the same side of
    every pixel as there.

    Attributes:
        low: (P,) where the first cell begins, with pixel k's centre at k.
        cell: (P,) length of a cell in px.
        samples: (P,) samples per cell, at least 1.
        start: (P,) int64, the first pixel that may count.
        stop: (P,) int64, past the last pixel that may count; above `start`.
        length: pixels along the axis.
        size: M, cells.
    """

    low: Tensor
    cell: Tensor
    samples: Tensor
    start: Tensor
    stop: Tensor
    length: int
    size: int

    @classmethod
    def of(
        cls, low: Tensor, high: Tensor, length: int, size: int, *, aligned: bool, sampling_ratio: int = -1
    ) -> AxisSampling:
        """Sample boxes along an axis.

        Args:
            low: (P,) float32 lower edges, in px.
            high: (P,) float32 upper edges.
            length: pixels along the axis.
            size: M, cells.
            aligned: whether pixel k's centre is at k + 0.5, or at k, where boxes are at least 1 px long.
            sampling_ratio: samples per cell; about one per pixel where not positive.
        """
        if aligned:
            low, high = low - 0.5, high - 0.5
        extent = high - low
        if not aligned:
            extent = extent.clamp(min=1.0)
        cell = extent / size
        # A box that no image holds has 2**24 samples per cell at most, so that they can be counted.
        samples = cell.ceil().clamp(1, 2**24)
        if sampling_ratio > 0:
            samples = torch.full_like(cell, sampling_ratio)
        ends = torch.stack([low + 0.5 * cell / samples, low + size * cell - 0.5 * cell / samples])
        # A pixel more at either end, against the rounding of these two.
        start = (ends.amin(0).floor() - 1).clamp(0, length - 1).long()
        stop = (ends.amax(0).floor() + 3).clamp(1, length).long()
        return cls(low, cell, samples, start, stop, length, size)

    def of_boxes(self, boxes: slice | Tensor) -> AxisSampling:
        """Take some of the boxes."""
        return AxisSampling(
            self.low[boxes],
            self.cell[boxes],
            self.samples[boxes],
            self.start[boxes],
            self.stop[boxes],
            self.length,
            self.size,
        )

    def to(self, device: torch.device) -> AxisSampling:
        """Move to a device, from the host without waiting for it."""
        low, cell, samples, start, stop = (
            values.to(device, non_blocking=True)
            for values in (self.low, self.cell, self.samples, self.start, self.stop)
        )
        return AxisSampling(low, cell, samples, start, stop, self.length, self.size)

    def sizes(self) -> tuple[int, int]:
        """Give the largest stop - start and the most samples per cell of any box, from tensors on the host."""
        return int((self.stop - self.start).max()), int(self.samples.max())

    def weights(self, window: int, most_samples: int) -> Tensor:
        """Weight of each pixel in each cell.

        Args:
            window: L, at least the largest stop - start.
            most_samples: at least the most samples per cell of any box. Both are arguments, because sizes are
                the host's to know: here nothing waits for a device, and torch.compile sees one graph.

        Returns:
            (P, M, L), where [p, m, k] is the weight of pixel start[p] + k in cell m of box p.
        """
        device = self.low.device
        most_in_image = 2 * self.length + 4  # they are over half a pixel apart
        low, cell, samples, start = (
            values[:, None, None] for values in (self.low, self.cell, self.samples, self.start)
        )
        cell_low = low + torch.arange(self.size, device=device)[None, :, None] * cell  # (P, M, 1)
        step = torch.arange(min(most_samples, most_in_image), device=device)
        if most_samples > most_in_image:
            # Far more samples than pixels: look only at those from the first in the image on.
            step = step + ((-1.0 - cell_low) * samples / cell - 1.5).floor().clamp(min=0)
        position = cell_low + (step + 0.5) * cell / samples  # (P, M, S)
        counted = (step < samples) & (position >= -1.0) & (position <= self.length)
        share = counted / samples
        position = position.clamp(0, self.length)
        below = position.floor().long().clamp(max=self.length - 1)
        # At the last pixel both are the same, so RoIAlign's holding of the value there comes by itself.
        above = (below + 1).clamp(max=self.length - 1)
        fraction = position - below
        weights = position.new_zeros((*position.shape[:2], window))
        weights.scatter_add_(2, (below - start).clamp(0, window - 1), share * (1 - fraction))
        weights.scatter_add_(2, (above - start).clamp(0, window - 1), share * fraction)
        return weights


def roi_align_bitmaps(
    masks: Tensor, boxes: Tensor, matched_idxs: Tensor, size: int, *, aligned: bool
) -> Tensor:
    """RoIAlign with an adaptive number of samples, one channel per box.

    Args:
        masks: (G, H, W) bool, or uint8 of 0 and 1, on any device.
        boxes: (P, 4) float32, xyxy in px, finite, P >= 1, on the host.
        matched_idxs: (P,) int64 in [0, G), on the host.
        size: M.
        aligned: whether pixel k's centre is at k + 0.5, or at k as in torchvision's targets.

    Returns:
        (P, M, M) float32 in [0, 1], on the masks' device.

    Raises:
        ValueError: a uint8 mask has a value above 1 where it was read.

    Source: He et al., "Mask R-CNN", 2017, section 3; `torchvision.ops.roi_align` with sampling_ratio=-1.
    """
    height, width = masks.shape[1:]
    x1, y1, x2, y2 = boxes.unbind(1)
    rows = AxisSampling.of(y1, y2, height, size, aligned=aligned)
    columns = AxisSampling.of(x1, x2, width, size, aligned=aligned)
    make = _one_by_one if masks.device.type == "cpu" else _in_groups
    targets, largest = make(masks, rows, columns, matched_idxs)
    if masks.dtype == torch.uint8 and largest > 1:
        raise ValueError("masks must hold 0 and 1 only, found larger values; use `masks > 0`")
    return _as_shares(targets)


def roi_align_runs(runs: Sequence[Runs], rows: AxisSampling, columns: AxisSampling) -> Tensor:
    """RoIAlign of masks that are given as runs of pixels down their columns, without the pixels.

    A run adds its column's weight times the sum of its rows' weights, which two cumulative sums give.

    Args:
        runs: of each of P boxes' mask.
        rows: sampling of the P boxes in y, on a CPU.
        columns: sampling of the P boxes in x, on a CPU.

    Returns:
        (P, M, M) float32 in [0, 1].
    """
    targets = torch.zeros((len(runs), rows.size, rows.size))
    for boxes in _chunks(len(runs)):
        # [..., k] is the weight of the window's first k rows.
        row_weights, column_weights = (
            axis.weights(*axis.sizes()).double() for axis in (rows.of_boxes(boxes), columns.of_boxes(boxes))
        )
        up_to = F.pad(row_weights.cumsum(2), (1, 0)).numpy()
        across = column_weights.numpy()
        windows = zip(
            rows.start[boxes].tolist(),
            rows.stop[boxes].tolist(),
            columns.start[boxes].tolist(),
            columns.stop[boxes].tolist(),
            strict=True,
        )
        for box, (mask, (top, bottom, left, right)) in enumerate(zip(runs[boxes], windows, strict=True)):
            read = (mask.column >= left) & (mask.column < right) & (mask.top < bottom) & (mask.bottom > top)
            ends = (mask.bottom[read].clip(max=bottom) - top, mask.top[read].clip(min=top) - top)
            height = up_to[box][:, ends[0]] - up_to[box][:, ends[1]]  # (M, R)
            target = height @ across[box][:, mask.column[read] - left].T
            targets[boxes.start + box] = torch.from_numpy(target)
    return _as_shares(targets)


def _as_shares(targets: Tensor) -> Tensor:
    """Clamp targets to [0, 1], which sums of rounded weights may leave by some 1e-7; in place."""
    return targets.clamp_(0, 1)


def _one_by_one(
    masks: Tensor, rows: AxisSampling, columns: AxisSampling, matched_idxs: Tensor
) -> tuple[Tensor, int]:
    """Take the crops one by one, each of its own size: least work, and a loop that a CPU does not mind."""
    windows = torch.stack([matched_idxs, rows.start, rows.stop, columns.start, columns.stop], dim=1).tolist()
    targets, peaks = [], [masks.new_zeros((), dtype=torch.uint8)]
    for boxes in _chunks(len(windows)):
        row_weights, column_weights = (
            axis.weights(*axis.sizes()) for axis in (rows.of_boxes(boxes), columns.of_boxes(boxes))
        )
        for box, (instance, top, bottom, left, right) in enumerate(windows[boxes]):
            crop = masks[instance, top:bottom, left:right]  # (h, w)
            if masks.dtype == torch.uint8:
                peaks.append(crop.max())
            half = row_weights[box, :, : bottom - top] @ crop.float()  # (M, w)
            targets.append(half @ column_weights[box, :, : right - left].T)  # (M, M)
    return torch.stack(targets), int(torch.stack(peaks).max())


def _in_groups(
    masks: Tensor, rows: AxisSampling, columns: AxisSampling, matched_idxs: Tensor
) -> tuple[Tensor, int]:
    """Take crops of like size together: few kernels, where starting one costs more than its work."""
    device = masks.device
    sizes = torch.stack([rows.stop - rows.start, columns.stop - columns.start], dim=1)
    # By height in octaves, then by width, so that neighbours are alike in both.
    order = (sizes[:, 0].log2().long() * (masks.shape[2] + 1) + sizes[:, 1]).argsort()
    targets = torch.empty((len(order), rows.size, rows.size), device=device)
    largest = masks.new_zeros((), dtype=torch.uint8)
    for first, last in pairwise(_group_ends(sizes[order].tolist())):
        boxes = order[first:last]
        group_rows, group_columns = rows.of_boxes(boxes), columns.of_boxes(boxes)
        group_targets, group_largest = align_crops(
            masks,
            matched_idxs[boxes].to(device, non_blocking=True),
            group_rows.to(device),
            group_columns.to(device),
            group_rows.sizes(),
            group_columns.sizes(),
        )
        if masks.dtype == torch.uint8:
            largest = torch.maximum(largest, group_largest)
        targets[boxes.to(device, non_blocking=True)] = group_targets
    return targets, int(largest) if masks.dtype == torch.uint8 else 1


def align_crops(
    masks: Tensor,
    instances: Tensor,
    rows: AxisSampling,
    columns: AxisSampling,
    row_sizes: tuple[int, int],
    column_sizes: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """RoIAlign of B crops that are padded to one size, by tensors of one device alone.

    Args:
        masks: (G, H, W) bool or uint8.
        instances: (B,) int64, the mask of each crop.
        rows: sampling of the B boxes in y, as are the masks on the device.
        columns: in x.
        row_sizes: `rows.sizes()`, which the host knows.
        column_sizes: `columns.sizes()`.

    Returns:
        (B, M, M) float32; and the largest value that was read, a scalar, 1 for bool masks.
    """
    y, x = (
        (axis.start[:, None] + torch.arange(window, device=masks.device)).clamp(max=axis.length - 1)
        for axis, (window, _) in ((rows, row_sizes), (columns, column_sizes))
    )
    crops = masks[instances[:, None, None], y[:, :, None], x[:, None, :]]  # (B, h, w)
    down, across = rows.weights(*row_sizes), columns.weights(*column_sizes)
    largest = crops.amax() if masks.dtype == torch.uint8 else masks.new_ones(())
    return _as_shares(down @ crops.float() @ across.transpose(1, 2)), largest


def _group_ends(sizes: list[list[int]]) -> Iterator[int]:
    """Yield 0, and then the end of each group of crops, of sizes [h, w], that are taken together."""
    yield 0
    height = width = pixels = first = 0
    for index, (h, w) in enumerate(sizes):
        height, width, pixels = max(height, h), max(width, w), pixels + h * w
        padded = height * width * (index + 1 - first)
        if index > first and (padded > _PIXELS_AT_ONCE or padded > _LARGEST_PADDING * pixels):
            yield index
            height, width, pixels, first = h, w, h * w, index
    yield len(sizes)


def _chunks(count: int) -> Iterator[slice]:
    for first in range(0, count, _BOXES_AT_ONCE):
        yield slice(first, first + _BOXES_AT_ONCE)
