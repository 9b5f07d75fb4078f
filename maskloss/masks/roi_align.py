"""RoIAlign of one mask per box: on a CPU as two small matrix products, on a GPU by torchvision's kernel.

On an axis-aligned grid, bilinear sampling is separable: a target is `rows @ crop @ columns.T`, where `rows` and
`columns` hold the weight of each pixel row and column in each cell. Only the crop is read and converted to float, never
a full-image mask. On a GPU, where each of the many small steps would cost a launch, torchvision's kernel samples float
copies of as many masks as fit a fixed amount of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskloss.masks.encoded import Runs

#: Chunk size on a CPU: boxes whose weights are computed together; their crops are sampled one by one.
_BOXES_AT_ONCE = 16
#: Message for uint8 masks with other values.
NOT_BINARY = "masks must hold 0 and 1 only, found larger values; use `masks > 0`"
#: Chunk size on a GPU: pixels of masks that are copied to float together, 128 MiB. At 800 x 1333 px these are 31 masks.
_PIXELS_AT_ONCE = 2**25


@dataclass(frozen=True)
class AxisSampling:
    """RoIAlign's sample positions along one axis, for each of P boxes.

    The arithmetic follows RoIAlign step by step, in float32, so that every sample falls on the same side of every
    pixel as in torchvision's operator.

    Attributes:
        low: (P,) start of the first cell, in coordinates that put pixel k's center at k.
        cell: (P,) length of a cell, in px.
        samples: (P,) samples per cell, at least 1.
        start: (P,) int64, first pixel that may have a weight.
        stop: (P,) int64, last pixel that may have a weight, plus 1; greater than `start`.
        length: number of pixels along the axis.
        size: M, number of cells.

    Example:
        >>> low, high = torch.tensor([1.0]), torch.tensor([3.0])
        >>> AxisSampling.of(low, high, length=4, size=1, aligned=True).weights(4, 2)
        tensor([[[0.0000, 0.5000, 0.5000, 0.0000]]])
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
        """Make the sample positions of boxes along an axis.

        Args:
            low: (P,) float32 low edges, in px.
            high: (P,) float32 high edges, in px.
            length: number of pixels along the axis.
            size: M, number of cells.
            aligned: True puts pixel k's center at k + 0.5; False puts it at k and makes boxes at least 1 px long.
            sampling_ratio: samples per cell; if not positive, about one per pixel.
        """
        if aligned:
            low, high = low - 0.5, high - 0.5
        extent = high - low
        if not aligned:
            extent = extent.clamp(min=1.0)
        cell = extent / size
        # float32 holds sample numbers up to 2**24 exactly; only boxes far larger than any image reach this limit.
        samples = cell.ceil().clamp(1, 2**24)
        if sampling_ratio > 0:
            samples = torch.full_like(cell, sampling_ratio)
        ends = torch.stack([low + 0.5 * cell / samples, low + size * cell - 0.5 * cell / samples])
        # One more pixel at either end, because `ends` is rounded.
        start = (ends.amin(0).floor() - 1).clamp(0, length - 1).long()
        stop = (ends.amax(0).floor() + 3).clamp(1, length).long()
        return cls(low, cell, samples, start, stop, length, size)

    def of_boxes(self, boxes: slice | Tensor) -> AxisSampling:
        """Return the sample positions of some of the boxes."""
        return AxisSampling(
            self.low[boxes],
            self.cell[boxes],
            self.samples[boxes],
            self.start[boxes],
            self.stop[boxes],
            self.length,
            self.size,
        )

    def sizes(self) -> tuple[int, int]:
        """Return the largest stop - start and the largest number of samples per cell."""
        return int((self.stop - self.start).max()), int(self.samples.max())

    def weights(self, window: int, most_samples: int) -> Tensor:
        """Compute the weight of each pixel in each cell.

        Args:
            window: L, at least the largest stop - start.
            most_samples: at least the largest number of samples per cell.

        Returns:
            (P, M, L), where [p, m, k] is the weight of pixel start[p] + k in cell m of box p.
        """
        like: Any = {"device": self.low.device, "dtype": self.low.dtype}  # not the default dtype
        most_in_image = 2 * self.length + 4  # samples are more than half a pixel apart
        low, cell, samples, start = (
            values[:, None, None] for values in (self.low, self.cell, self.samples, self.start)
        )
        cell_low = low + torch.arange(self.size, **like)[None, :, None] * cell  # (P, M, 1)
        step = torch.arange(min(most_samples, most_in_image), **like)
        if most_samples > most_in_image:
            # Far more samples than pixels: start with the first sample in the image.
            step = step + ((-1.0 - cell_low) * samples / cell - 1.5).floor().clamp(min=0)
        position = cell_low + (step + 0.5) * cell / samples  # (P, M, S)
        counted = (step < samples) & (position >= -1.0) & (position <= self.length)
        share = counted / samples
        position = position.clamp(0, self.length)
        below = position.floor().long().clamp(max=self.length - 1)
        # At the last pixel, below equals above, so the value is extended beyond it, as in RoIAlign.
        above = (below + 1).clamp(max=self.length - 1)
        fraction = position - below
        weights = position.new_zeros((*position.shape[:2], window))
        weights.scatter_add_(2, (below - start).clamp(0, window - 1), share * (1 - fraction))
        weights.scatter_add_(2, (above - start).clamp(0, window - 1), share * fraction)
        return weights


def roi_align_bitmaps(
    masks: Tensor, boxes: Tensor, matched_idxs: Tensor, size: int, *, aligned: bool
) -> Tensor:
    """Compute RoIAlign with an adaptive number of samples, one mask per box. On a GPU this does not synchronize.

    Args:
        masks: (G, H, W) bool, or uint8 of 0 and 1, on any device. The values are checked on a CPU only.
        boxes: (P, 4) float32, xyxy in px, finite, P >= 1, on the masks' device.
        matched_idxs: (P,) int64 in [0, G), on the masks' device.
        size: M.
        aligned: True puts pixel k's center at k + 0.5; False at k, as torchvision's targets do.

    Returns:
        (P, M, M) float32 in [0, 1], on the masks' device.

    Raises:
        ValueError: a uint8 mask on a CPU has a value above 1 in a box.

    Example:
        >>> masks, boxes = torch.tensor([[[0, 1], [0, 1]]], dtype=torch.bool), torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> roi_align_bitmaps(masks, boxes, torch.tensor([0]), 2, aligned=True)
        tensor([[[0., 1.],
                 [0., 1.]]])

    Source: He et al., "Mask R-CNN", 2017, section 3; `torchvision.ops.roi_align` with sampling_ratio=-1.
    """
    if masks.device.type != "cpu":
        return _as_shares(_by_kernel(masks, boxes, matched_idxs, size, aligned))
    height, width = masks.shape[1:]
    x1, y1, x2, y2 = boxes.unbind(1)
    rows = AxisSampling.of(y1, y2, height, size, aligned=aligned)
    columns = AxisSampling.of(x1, x2, width, size, aligned=aligned)
    targets, largest = _one_by_one(masks, rows, columns, matched_idxs)
    if largest > 1:
        raise ValueError(NOT_BINARY)
    return _as_shares(targets)


def roi_align_runs(runs: Sequence[Runs], rows: AxisSampling, columns: AxisSampling) -> Tensor:
    """Compute RoIAlign of masks that are given as vertical runs, without decoding them to bitmaps.

    A run adds its column's weight times the sum of its rows' weights. The sum is the difference of two cumulative sums.

    Args:
        runs: the mask of each of P boxes.
        rows: sample positions of the P boxes in y, on the host.
        columns: sample positions of the P boxes in x, on the host.

    Returns:
        (P, M, M) float32 in [0, 1].

    Example:
        >>> import numpy as np
        >>> axis = AxisSampling.of(torch.tensor([0.0]), torch.tensor([2.0]), length=2, size=2, aligned=True)
        >>> roi_align_runs([Runs(np.array([1]), np.array([0]), np.array([2]))], axis, axis).tolist()
        [[[0.0, 1.0], [0.0, 1.0]]]
    """
    targets = torch.zeros((len(runs), rows.size, rows.size), dtype=torch.float32, device="cpu")
    for boxes in _chunks(len(runs)):
        # up_to[..., k] is the total weight of the window's first k rows.
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
    """Clamp targets to [0, 1] in place; sums of rounded weights may exceed the range by about 1e-7."""
    return targets.clamp_(0, 1)


def _one_by_one(
    masks: Tensor, rows: AxisSampling, columns: AxisSampling, matched_idxs: Tensor
) -> tuple[Tensor, int]:
    """Sample the crops one by one, each at its own size: the least arithmetic, and on a CPU a loop is cheap."""
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


def _by_kernel(masks: Tensor, boxes: Tensor, matched_idxs: Tensor, size: int, aligned: bool) -> Tensor:
    """Sample float copies of the masks by torchvision's kernel, a chunk of masks at a time."""
    count = max(_PIXELS_AT_ONCE // (masks.shape[1] * masks.shape[2]), 1)
    targets = []
    for first in range(0, len(masks), count):
        chunk = masks[first : first + count]
        index, read = matched_idxs, boxes
        if len(chunk) < len(masks):
            # Which boxes belong to a chunk is known on the device only. The kernel samples 0 for boxes outside.
            elsewhere = (matched_idxs < first) | (matched_idxs >= first + count)
            index = (matched_idxs - first).clamp(0, len(chunk) - 1)
            read = boxes.masked_fill(elsewhere[:, None], -4.0)
        rois = torch.cat([index[:, None], read], dim=1)
        # The operator itself, because under deterministic algorithms `torchvision.ops.roi_align` replaces it by code
        # that needs memory for every pixel of the image in every cell. Only its gradient is not deterministic.
        sampled = torch.ops.torchvision.roi_align(chunk[:, None].float(), rois, 1.0, size, size, -1, aligned)
        targets.append(sampled[:, 0])
    summed: Tensor = sum(targets[1:], start=targets[0])
    return summed


def _chunks(count: int) -> Iterator[slice]:
    for first in range(0, count, _BOXES_AT_ONCE):
        yield slice(first, first + _BOXES_AT_ONCE)
