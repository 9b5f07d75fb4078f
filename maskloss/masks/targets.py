"""Mask targets: what the M x M grid of each positive RoI is compared with.

A bitmap's target is RoIAlign of the mask. On an axis-aligned grid bilinear sampling is separable, so a target
is `rows @ crop @ columns.T` with two small weight matrices, and only the crop is ever read or converted: no
float copy of a full-image mask is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from maskloss.masks.encoded import EncodedMasks, FloatArray


@dataclass(frozen=True)
class MaskTargets:
    """How mask targets are made from the ground truth.

    Attributes:
        aligned: True puts a mask where it is. False is torchvision's RoIAlign, which is half a pixel off;
            a network trained so needs its masks pasted with the matching shift.
        binary: True thresholds at 0.5, as Detectron2 does. False keeps the fraction of each cell that is
            covered, which tells the network where inside the cell the boundary runs.
    """

    aligned: bool = True
    binary: bool = False


def mask_targets(
    gt_masks: Tensor | EncodedMasks,
    boxes: Tensor,
    matched_idxs: Tensor,
    size: int,
    *,
    aligned: bool = True,
    binary: bool = False,
) -> Tensor:
    """Crop each RoI's matched ground-truth mask to its box and resize it to the grid.

    Args:
        gt_masks: one image's masks: (G, H, W) bool, or uint8 of 0 and 1, or `EncodedMasks`.
        boxes: (P, 4), xyxy in px of this image.
        matched_idxs: (P,) int64 in [0, G), the instance that each box is matched to.
        size: M, cells a side.
        aligned: False shifts by half a pixel, which is torchvision's target.
        binary: threshold at 0.5 (bitmaps), or rasterise inside the box (polygons).

    Returns:
        (P, M, M) float32 in [0, 1] on the boxes' device; binary ones hold 0 and 1 only. Bitmaps and RLEs are
        sampled as RoIAlign does with an adaptive number of samples per cell; polygons give the exact area of
        each cell that they cover. Overlapping polygons of one instance count once, to within the
        cell; so do the loops of one that crosses itself.

    Raises:
        TypeError: the masks are of another dtype.
        ValueError: the masks are no (G, H, W), or a mask has a value other than 0 and 1 where it was read.

    Source: bitmaps: `torchvision.ops.roi_align` with sampling_ratio=-1, which torchvision calls unaligned
    and Detectron2 aligned and thresholded. Binary polygons: Detectron2's `rasterize_polygons_within_box`.
    """
    boxes = boxes.detach()
    if isinstance(gt_masks, EncodedMasks):
        # Its work is done in host memory, so it is the host's autocast that counts.
        with torch.autocast("cpu", enabled=False):
            return _from_encoded(gt_masks, boxes, matched_idxs, size, aligned, binary)
    if gt_masks.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"masks must be bool or uint8 tensors of 0 and 1, not {gt_masks.dtype}")
    if gt_masks.dim() != 3:
        raise ValueError(f"masks must have shape (G, H, W), not {tuple(gt_masks.shape)}")
    # Autocast would round the matrix products to half precision.
    with torch.autocast(boxes.device.type, enabled=False):
        targets = _roi_align(gt_masks, boxes, matched_idxs, size, aligned)
    return (targets >= 0.5).float() if binary else targets


def _roi_align(masks: Tensor, boxes: Tensor, matched_idxs: Tensor, size: int, aligned: bool) -> Tensor:
    """RoIAlign of one channel per box, (P, M, M), by two matrix products on each box's crop."""
    num_boxes = boxes.shape[0]
    if num_boxes == 0:
        return boxes.new_zeros((0, size, size), dtype=torch.float32)
    height, width = masks.shape[1:]
    x1, y1, x2, y2 = boxes.float().unbind(1)
    rows, top, bottom = _sampling_matrix(y1, y2, height, size, aligned)  # (P, M, h)
    columns, left, right = _sampling_matrix(x1, x2, width, size, aligned)  # (P, M, w)
    windows = torch.stack([matched_idxs, top, bottom, left, right], dim=1).tolist()
    targets, peaks = [], []
    for box, (instance, y_low, y_high, x_low, x_high) in enumerate(windows):
        crop = masks[instance, y_low:y_high, x_low:x_high]  # (h, w)
        if masks.dtype == torch.uint8 and crop.numel():
            peaks.append(crop.max())
        half = rows[box, :, : y_high - y_low] @ crop.float()  # (M, w)
        targets.append(half @ columns[box, :, : x_high - x_low].T)  # (M, M)
    if peaks and torch.stack(peaks).max() > 1:
        raise ValueError("masks must hold 0 and 1 only, found larger values; use `masks > 0`")
    return torch.stack(targets)


def _sampling_matrix(
    low: Tensor, high: Tensor, length: int, size: int, aligned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of one axis: cell m of box p is the sum over pixels of weight[p, m, pixel - start[p]].

    Follows the arithmetic of RoIAlign step by step, in float32, so that every sample falls on the same side
    of every pixel as there.

    Args:
        low: (P,) lower edge of each box, in px.
        high: (P,) upper edge.
        length: pixels along the axis.
        size: M.
        aligned: whether pixel k's centre is at k + 0.5 (aligned) or at k.

    Returns:
        weight (P, M, L) with L the longest stretch of pixels that any box reads, start (P,) and stop (P,).
    """
    if aligned:
        low, high = low - 0.5, high - 0.5
    extent = high - low
    if not aligned:
        extent = extent.clamp(min=1.0)
    cell = extent / size
    samples = cell.ceil().clamp(min=1).long()  # (P,), adaptive: about one per pixel
    most = int(samples.max())
    step = torch.arange(most, device=low.device)
    cells = torch.arange(size, device=low.device, dtype=torch.float32)
    position = (
        low[:, None, None]
        + cells[None, :, None] * cell[:, None, None]
        + (step + 0.5)[None, None, :] * cell[:, None, None] / samples[:, None, None]
    )  # (P, M, S)
    counted = (step < samples[:, None])[:, None, :] & (position >= -1.0) & (position <= length)
    position = position.clamp(min=0.0)
    below = position.floor().long().clamp(max=length - 1)
    above = (below + 1).clamp(max=length - 1)
    # At the last pixel both are the same, so RoIAlign's holding of the value there comes by itself.
    fraction = position - below
    share = counted / samples[:, None, None]

    unread = torch.full_like(below, length)
    start = torch.where(counted, below, unread).amin(dim=(1, 2))
    stop = torch.where(counted, above + 1, torch.zeros_like(above)).amax(dim=(1, 2))
    start = torch.minimum(start, stop)
    longest = max(int((stop - start).max()), 1)
    weight = position.new_zeros((len(low), size, longest))
    origin = start[:, None, None]
    weight.scatter_add_(2, (below - origin).clamp(0, longest - 1), share * (1 - fraction))
    weight.scatter_add_(2, (above - origin).clamp(0, longest - 1), share * fraction)
    return weight, start, stop


def _from_encoded(
    masks: EncodedMasks, boxes: Tensor, matched_idxs: Tensor, size: int, aligned: bool, binary: bool
) -> Tensor:
    targets = torch.zeros((boxes.shape[0], size, size), dtype=torch.float32)
    host_boxes = boxes.detach().double().cpu()
    if not aligned:
        # Unaligned sampling reads half a pixel further right and down, so the box does.
        host_boxes = host_boxes + 0.5
    matched = matched_idxs.tolist()
    polygon_rois: list[int] = []
    polygon_sets: list[list[FloatArray]] = []
    bitmap_rois: dict[int, list[int]] = {}
    for roi, instance in enumerate(matched):
        polygons = masks.polygons(instance)
        if polygons is None:
            bitmap_rois.setdefault(instance, []).append(roi)
        else:
            polygon_rois.append(roi)
            polygon_sets.append(polygons)
    if polygon_rois:
        make = _rasterised if binary else _coverage
        targets[polygon_rois] = make(polygon_sets, host_boxes[polygon_rois].numpy(), size)
    for instance, rois in bitmap_rois.items():
        bitmap = masks.source_bitmap(instance)
        assert bitmap is not None
        soft = _from_source_bitmap(bitmap, masks, host_boxes[rois], size)
        targets[rois] = (soft >= 0.5).float() if binary else soft
    return targets.to(boxes.device)


def _from_source_bitmap(bitmap: Tensor, masks: EncodedMasks, boxes: Tensor, size: int) -> Tensor:
    """Aligned targets of one RLE, sampled at the resolution that it was annotated in."""
    x = masks.x_map.inverse(boxes[:, 0::2])
    y = masks.y_map.inverse(boxes[:, 1::2])
    source = torch.stack([x.amin(1), y.amin(1), x.amax(1), y.amax(1)], dim=1)
    targets = _roi_align(bitmap[None], source, torch.zeros(len(boxes), dtype=torch.long), size, aligned=True)
    return targets.flip(2) if masks.x_map.scale < 0 else targets


def _rasterised(polygon_sets: list[list[FloatArray]], boxes: FloatArray, size: int) -> Tensor:
    """Binary targets by pycocotools' rasteriser on the grid of the box, (P, M, M)."""
    targets = np.zeros((len(polygon_sets), size, size), dtype=np.float32)
    for roi, (polygons, (x1, y1, x2, y2)) in enumerate(zip(polygon_sets, boxes, strict=True)):
        # The floor of 0.1 px under a box's sides is Detectron2's.
        scale = np.array([size / max(x2 - x1, 0.1), size / max(y2 - y1, 0.1)])
        flat = [((polygon - (x1, y1)) * scale).reshape(-1).tolist() for polygon in polygons]
        targets[roi] = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, size, size)))
    return torch.from_numpy(targets)


def _coverage(polygon_sets: list[list[FloatArray]], boxes: FloatArray, size: int) -> Tensor:
    """Fraction of each cell's area inside the polygons, exactly, (P, M, M).

    Each edge is cut at the grid lines. A piece inside one cell, dy high and on average a fraction f of the
    cell from its left side, covers dy (1 - f) of that cell and dy of every cell to its right, with dy's sign;
    summed along a row from the left this is the signed area of the polygon in each cell.

    Source: Green's theorem; font rasterisers work so (Raph Levien, "Inside the fastest font renderer in the
    world", 2016).
    """
    low = boxes[:, :2]
    scale = size / np.maximum(boxes[:, 2:] - low, 1e-6)
    covered = np.zeros((len(polygon_sets), size, size))
    for roi, polygons in enumerate(polygon_sets):
        for polygon in polygons:
            covered[roi] += _signed_coverage((polygon - low[roi]) * scale[roi], size)
    return torch.from_numpy(np.minimum(covered, 1.0).astype(np.float32))


def _signed_coverage(points: FloatArray, size: int) -> FloatArray:
    """Coverage of the unit cells of a size x size grid by one polygon (V, 2) in grid units, >= 0."""
    starts, ends = points, np.roll(points, -1, axis=0)
    # An edge wholly above or below the grid covers nothing, and a level one has dy = 0.
    y_low, y_high = np.minimum(starts[:, 1], ends[:, 1]), np.maximum(starts[:, 1], ends[:, 1])
    inside = (y_high > 0) & (y_low < size) & (y_high > y_low)
    starts, ends = starts[inside], ends[inside]
    if not len(starts):
        return np.zeros((size, size))
    delta = ends - starts
    lines = np.arange(size + 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        cuts = (lines[None, None, :] - starts[:, :, None]) / delta[:, :, None]  # (E, 2, M + 1)
    cuts = np.nan_to_num(cuts.reshape(len(starts), -1), nan=0.0, posinf=1.0, neginf=0.0).clip(0.0, 1.0)
    cuts = np.sort(
        np.concatenate([cuts, np.zeros((len(starts), 1)), np.ones((len(starts), 1))], axis=1), axis=1
    )
    at = starts[:, None, :] + cuts[:, :, None] * delta[:, None, :]  # (E, cuts, 2)
    middle = (at[:, 1:] + at[:, :-1]) / 2
    dy = at[:, 1:, 1] - at[:, :-1, 1]
    row = np.floor(middle[..., 1]).astype(np.int64)
    x = middle[..., 0].clip(0.0, size)
    used = (dy != 0) & (row >= 0) & (row < size)
    row, x, dy = row[used], x[used], dy[used]
    column = np.minimum(np.floor(x).astype(np.int64), size - 1)
    fraction = x - column
    flat = row * (size + 1) + column
    area = np.bincount(flat, dy * (1 - fraction), minlength=size * (size + 1))
    area += np.bincount(flat + 1, dy * fraction, minlength=size * (size + 1))[: size * (size + 1)]
    covered: FloatArray = np.abs(area.reshape(size, size + 1)[:, :size].cumsum(axis=1))
    return covered
