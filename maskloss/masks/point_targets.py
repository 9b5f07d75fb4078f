"""Point targets: whether points lie inside their ground-truth masks, without rasterizing polygons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maskloss.masks.encoded import EncodedMasks, FloatArray

#: Chunk size: number of pairs of a point and an edge compared at once.
_PAIRS_AT_ONCE = 2**22


def point_targets(gt_masks: Tensor | EncodedMasks, points: Tensor, matched_idxs: Tensor) -> Tensor:
    """Return whether points lie inside their matched ground-truth masks.

    Args:
        gt_masks: one image's masks: (G, H, W) bool or uint8 of 0 and 1, or `EncodedMasks`.
        points: (P, K, 2), x and y in px of the image, 0 at its left and upper border.
        matched_idxs: (P,) int64, index of the mask that each row of points is matched to.

    Returns:
        (P, K) float32 on the points' device: for polygons exactly 0 or 1, by the even-odd rule; for bitmaps and RLEs
        interpolated bilinearly between pixel centers, with 0 outside the image.

    Raises:
        ValueError: an object has no mask, the points are not (P, K, 2), there is not one index per row of points, or,
            on a CPU, an index is outside [0, G).

    Example:
        >>> masks = EncodedMasks([[[1.0, 1.0, 3.0, 1.0, 3.0, 3.0, 1.0, 3.0]]], height=4, width=4)
        >>> point_targets(masks, torch.tensor([[[2.0, 2.5], [0.5, 2.0]]]), torch.tensor([0]))
        tensor([[1., 0.]])

    Source: Kirillov et al., PointRend, 2019, arXiv:1912.08193; Detectron2's PointRend samples bitmaps.
    """
    if points.dim() != 3 or points.shape[2] != 2 or matched_idxs.shape != points.shape[:1]:
        raise ValueError(
            "points must have shape (P, K, 2) and matched_idxs (P,), got "
            f"{tuple(points.shape)} and {tuple(matched_idxs.shape)}"
        )
    # Reading indices on a GPU would synchronize.
    if matched_idxs.device.type == "cpu" and len(matched_idxs):
        low, high = int(matched_idxs.min()), int(matched_idxs.max())
        if not 0 <= low <= high < len(gt_masks):
            raise ValueError(f"matched_idxs must be in [0, {len(gt_masks)}), got {low} to {high}")
    if isinstance(gt_masks, Tensor):
        return bitmaps_at_points(gt_masks, points, matched_idxs)
    targets = points.new_zeros(points.shape[:2], dtype=torch.float32)
    idxs = matched_idxs.tolist()
    of_polygons = [row for row, index in enumerate(idxs) if not gt_masks.is_rle(index)]
    of_rles = [row for row, index in enumerate(idxs) if gt_masks.is_rle(index)]
    if of_polygons:
        polygons = [gt_masks.polygons(idxs[row]) for row in of_polygons]
        rows = torch.tensor(of_polygons, device=points.device)
        targets[rows] = _inside(polygons, points[rows]).float()
    if of_rles:
        used = sorted({idxs[row] for row in of_rles})
        bitmaps = gt_masks[used].bitmaps().to(points.device)
        rows = torch.tensor(of_rles, device=points.device)
        own = torch.tensor([used.index(idxs[row]) for row in of_rles], device=points.device)
        targets[rows] = bitmaps_at_points(bitmaps, points[rows], own)
    return targets


def bitmaps_at_points(masks: Tensor, points: Tensor, matched_idxs: Tensor) -> Tensor:
    """Sample bitmaps bilinearly between pixel centers.

    Only the four pixels around each point are read and converted to float.

    Args:
        masks: (G, H, W) of 0 and 1.
        points: (P, K, 2), x and y in px of the image.
        matched_idxs: (P,) int64.

    Returns:
        (P, K) float32 in [0, 1]; pixels outside the image count as 0.

    Example:
        >>> mask = torch.tensor([[[0, 1]]])
        >>> bitmaps_at_points(mask, torch.tensor([[[1.5, 0.5], [1.0, 0.5]]]), torch.tensor([0]))
        tensor([[1.0000, 0.5000]])
    """
    height, width = masks.shape[-2:]
    masks, idxs = masks.to(points.device), matched_idxs.to(points.device)[:, None]
    x, y = (points.float() - 0.5).unbind(dim=2)  # (P, K)
    left, top = x.floor(), y.floor()
    values = torch.zeros_like(x)
    for dx in (0, 1):
        for dy in (0, 1):
            column, row = left + dx, top + dy
            share = (1 - (x - column).abs()) * (1 - (y - row).abs())
            is_inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            pixels = masks[idxs, row.long().clamp(0, height - 1), column.long().clamp(0, width - 1)]
            values = values + torch.where(is_inside, share * pixels.float(), 0.0)
    return values


def _inside(instances: Sequence[Sequence[FloatArray]], points: Tensor) -> Tensor:
    """Return which points lie inside the union of each instance's polygons, (P, K) bool, for P instances."""
    owner = [row for row, polygons in enumerate(instances) for _ in polygons]
    if not owner:
        raise ValueError("an object has no mask, so its points have no targets")
    polygons = [polygon for of_instance in instances for polygon in of_instance]
    # The longest first, so that few polygons are padded to the length of a much longer one.
    order = sorted(range(len(polygons)), key=lambda polygon: -len(polygons[polygon]))
    inside = torch.zeros(points.shape[:2], dtype=torch.bool, device=points.device)
    while order:
        longest = len(polygons[order[0]]) + 1
        chunk = max(_PAIRS_AT_ONCE // max(points.shape[1] * longest, 1), 1)
        chosen, order = order[:chunk], order[chunk:]
        some = _padded([polygons[polygon] for polygon in chosen]).to(
            points.device, points.dtype
        )  # (q, V + 1, 2)
        own = torch.tensor([owner[polygon] for polygon in chosen], device=points.device)
        x, y = points[own][:, :, None].unbind(dim=-1)  # (q, K, 1)
        x1, y1 = some[:, None, :-1].unbind(dim=-1)  # (q, 1, V)
        x2, y2 = some[:, None, 1:].unbind(dim=-1)
        crosses = (y1 > y) != (y2 > y)
        slope = (x2 - x1) / torch.where(y1 == y2, 1.0, y2 - y1)
        is_left = x < x1 + (y - y1) * slope
        is_in_polygon = (crosses & is_left).sum(dim=2) % 2 == 1  # (q, K)
        inside |= torch.zeros_like(inside, dtype=torch.int32).index_add_(0, own, is_in_polygon.int()) > 0
    return inside


def _padded(polygons: Sequence[FloatArray]) -> Tensor:
    """Close polygons with their first vertices, and pad them with copies: edges of length 0 cross no line."""
    longest = max(len(polygon) for polygon in polygons) + 1
    padded = np.empty((len(polygons), longest, 2))
    for row, polygon in zip(padded, polygons, strict=True):
        row[: len(polygon)] = polygon
        row[len(polygon) :] = polygon[0]
    return torch.from_numpy(padded)
