"""Mask targets: the ground truth of each positive RoI, on its M x M grid.

Bitmaps and RLEs are sampled by RoIAlign (`roi_align.py`); polygons are integrated exactly (`coverage.py`). Neither
makes or copies a full-image mask.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskloss.masks.checks import check_finite, check_tensors
from maskloss.masks.coco_format import rasterize_polygons
from maskloss.masks.coverage import polygon_coverage
from maskloss.masks.encoded import EncodedMasks, FloatArray
from maskloss.masks.roi_align import NOT_BINARY, AxisSampling, roi_align_bitmaps, roi_align_runs
from maskloss.masks.transfer import to_host

#: Minimum side of a box in px. A box without area is treated as a point.
_LEAST_SIDE = 1e-6


@dataclass(frozen=True)
class MaskTargets:
    """Options for making mask targets from the ground truth.

    Attributes:
        aligned: True keeps masks at their exact position. False uses torchvision's RoIAlign, which is off by half a
            pixel; masks predicted by a network trained this way must be pasted with the matching offset.
        binary: True thresholds at 0.5, as Detectron2 does. False keeps the covered fraction of each cell, which tells
            the network where inside the cell the boundary runs.

    Raises:
        TypeError: a value is not a bool.

    Example:
        >>> MaskTargets(binary=True)
        MaskTargets(aligned=True, binary=True)
    """

    aligned: bool = True
    binary: bool = False

    def __post_init__(self) -> None:
        for name in ("aligned", "binary"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(
                    f"MaskTargets({name}=...) must be True or False, not {type(value).__name__} {value!r}"
                )


def mask_targets(
    gt_masks: Tensor | EncodedMasks,
    boxes: Tensor,
    matched_idxs: Tensor,
    size: int,
    *,
    aligned: bool = True,
    binary: bool = False,
) -> Tensor:
    """Crop each RoI's matched ground-truth mask to its box and resize it to the M x M grid.

    Bitmaps are sampled on their own device, encoded masks on the host. Checking boxes or masks on a GPU costs one
    synchronization.

    Args:
        gt_masks: one image's masks: (G, H, W) bool, or uint8 of 0 and 1, or `EncodedMasks`.
        boxes: (P, 4), xyxy in px of this image.
        matched_idxs: (P,) int64 in [0, G), index of the instance matched to each box.
        size: M, cells per side.
        aligned: False shifts by half a pixel, as torchvision's targets do.
        binary: threshold at 0.5 (bitmaps, RLEs), or rasterize inside the box (polygons).

    Returns:
        (P, M, M) float32 in [0, 1] on the boxes' device; only 0 and 1 if binary. Bitmaps and RLEs are sampled as
        RoIAlign does, with an adaptive number of samples per cell. For polygons, values are the exact fraction of each
        cell that their union covers; self-crossing polygons are filled by the even-odd rule, as in pycocotools.

    Raises:
        TypeError: an argument has another type, or a tensor another dtype.
        ValueError: the masks do not have shape (G, H, W), the boxes not (P, 4) or the indices not (P,); a uint8 mask
            has a value other than 0 and 1 in a box; an instance in `matched_idxs` has no mask; a box is not finite; or
            an index is outside [0, G).

    Example:
        >>> masks = EncodedMasks([[[0, 0, 3, 0, 3, 4, 0, 4]]], height=4, width=4)
        >>> mask_targets(masks, torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0]), 2)
        tensor([[[1.0000, 0.5000],
                 [1.0000, 0.5000]]])

    Source: bitmaps: `torchvision.ops.roi_align` with sampling_ratio=-1, which torchvision uses unaligned, and
    Detectron2 aligned and thresholded. Binary polygons: Detectron2's `rasterize_polygons_within_box`.
    """
    _check_form(gt_masks)
    _check_arguments(boxes, matched_idxs, size)
    MaskTargets(aligned=aligned, binary=binary)  # checks their types
    if len(boxes) == 0:
        return boxes.new_zeros((0, size, size), dtype=torch.float32)
    bitmaps_on_gpu = gt_masks if isinstance(gt_masks, Tensor) and gt_masks.device.type != "cpu" else None
    checked = [boxes.detach(), matched_idxs]
    if bitmaps_on_gpu is not None and bitmaps_on_gpu.dtype == torch.uint8 and len(bitmaps_on_gpu):
        checked.append(bitmaps_on_gpu.amax())
    host_boxes, host_idxs, *largest = to_host(checked)
    if largest and int(largest[0]) > 1:
        raise ValueError(NOT_BINARY)
    host_boxes = host_boxes.double()
    if bitmaps_on_gpu is None:
        targets = targets_of_host_boxes(gt_masks, host_boxes, host_idxs, size, aligned=aligned, binary=binary)
        return targets.to(boxes.device)
    _check_matches(gt_masks, host_boxes, host_idxs)
    there = bitmaps_on_gpu.device
    targets = targets_of_bitmaps(
        bitmaps_on_gpu,
        boxes.detach().to(there),
        matched_idxs.to(there),
        size,
        aligned=aligned,
        binary=binary,
    )
    return targets.to(boxes.device)


def targets_of_host_boxes(
    gt_masks: Tensor | EncodedMasks,
    boxes: Tensor,
    matched_idxs: Tensor,
    size: int,
    *,
    aligned: bool,
    binary: bool,
) -> Tensor:
    """Compute `mask_targets` of boxes (P >= 1, float64), indices and masks that are on the host.

    Returns:
        (P, M, M) float32, on the host.

    Example:
        >>> masks, boxes = torch.eye(4, dtype=torch.bool)[None], torch.tensor([[0.0, 0.0, 4.0, 4.0]]).double()
        >>> targets_of_host_boxes(masks, boxes, torch.tensor([0]), 2, aligned=True, binary=False)
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.5000]]])
    """
    _check_form(gt_masks)
    _check_matches(gt_masks, boxes, matched_idxs)
    if isinstance(gt_masks, Tensor):
        return targets_of_bitmaps(gt_masks, boxes, matched_idxs, size, aligned=aligned, binary=binary)
    # Autocast would round matrix products to half precision, and another default device would not hold the masks.
    with torch.autocast("cpu", enabled=False), on_host():
        return _from_encoded(gt_masks, boxes, matched_idxs, size, aligned, binary)


def targets_of_bitmaps(
    gt_masks: Tensor, boxes: Tensor, matched_idxs: Tensor, size: int, *, aligned: bool, binary: bool
) -> Tensor:
    """Compute `mask_targets` of bitmaps, with boxes and indices on their device, without synchronizing.

    Args:
        gt_masks: (G, H, W) bool, or uint8 of 0 and 1.
        boxes: (P, 4), xyxy in px, finite, P >= 1.
        matched_idxs: (P,) int64 in [0, G).
        size: M.
        aligned: see `mask_targets`.
        binary: see `mask_targets`.

    Returns:
        (P, M, M) float32, on the masks' device.

    Example:
        >>> masks, boxes = torch.eye(4, dtype=torch.bool)[None], torch.tensor([[0.0, 0.0, 4.0, 4.0]])
        >>> targets_of_bitmaps(masks, boxes, torch.tensor([0]), 2, aligned=True, binary=True)
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    # Autocast would round matrix products to half precision.
    with torch.autocast(gt_masks.device.type, enabled=False):
        targets = roi_align_bitmaps(gt_masks, boxes.float(), matched_idxs, size, aligned=aligned)
    return _thresholded(targets) if binary else targets


def on_host() -> AbstractContextManager[Any]:
    """Return a context in which new tensors are on the host, whatever the user's default device is.

    Example:
        >>> with torch.device("meta"), on_host():
        ...     torch.zeros(1).device
        device(type='cpu')
    """
    # torch calls every function through a context of a device, which takes time, so there is none if it is not needed.
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _check_matches(gt_masks: Tensor | EncodedMasks, boxes: Tensor, matched_idxs: Tensor) -> None:
    """Raise an error if boxes or indices, both on the host, are out of range."""
    check_finite(boxes)
    low, high = int(matched_idxs.min()), int(matched_idxs.max())
    if low < 0 or high >= len(gt_masks):
        found = low if low < 0 else high
        raise ValueError(
            f"matched_idxs must lie in [0, {len(gt_masks)}) for {len(gt_masks)} masks, found {found}"
        )


def _check_arguments(boxes: Any, matched_idxs: Any, size: Any) -> None:
    check_tensors(boxes=boxes, matched_idxs=matched_idxs)
    if not isinstance(size, int | np.integer) or isinstance(size, bool):
        raise TypeError(f"size must be an integer, the number of cells per side, not {size!r}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    count = boxes.shape[0] if boxes.dim() else 0
    if boxes.dim() == 0 or (boxes.numel() and boxes.shape[1:] != (4,)):
        raise ValueError(f"boxes must have shape (P, 4), not {tuple(boxes.shape)}")
    if boxes.numel() and matched_idxs.shape != (count,):
        raise ValueError(
            f"matched_idxs must have shape ({count},), one index per box, not {tuple(matched_idxs.shape)}"
        )
    if matched_idxs.numel() and matched_idxs.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"matched_idxs must be int64, not {matched_idxs.dtype}")


def _check_form(gt_masks: Tensor | EncodedMasks) -> None:
    if isinstance(gt_masks, EncodedMasks):
        return
    if not isinstance(gt_masks, Tensor):
        raise TypeError(f"masks must be a tensor (G, H, W) or EncodedMasks, not {type(gt_masks).__name__}")
    if gt_masks.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"masks must be bool or uint8 tensors of 0 and 1, not {gt_masks.dtype}")
    if gt_masks.dim() != 3 or 0 in gt_masks.shape[1:]:
        raise ValueError(f"masks must have shape (G, H, W), not {tuple(gt_masks.shape)}")


def _from_encoded(
    masks: EncodedMasks, boxes: Tensor, matched_idxs: Tensor, size: int, aligned: bool, binary: bool
) -> Tensor:
    if not aligned:
        # Shift the box instead of the samples: unaligned RoIAlign samples half a pixel further right and down. It also
        # makes boxes at least one pixel long.
        low = boxes[:, :2] + 0.5
        boxes = torch.cat([low, low + (boxes[:, 2:] - boxes[:, :2]).clamp(min=1.0)], dim=1)
    targets = torch.empty((len(boxes), size, size), dtype=torch.float32)
    for index in sorted(set(matched_idxs.tolist())):
        if not masks.has_mask(index):
            raise ValueError(f"instance {index} has no mask, so it has no mask targets")
    rle = torch.tensor([masks.is_rle(index) for index in matched_idxs.tolist()])
    for chosen, make in ((~rle, _from_polygons), (rle, _from_rles)):
        if chosen.any():
            targets[chosen] = make(masks, boxes[chosen], matched_idxs[chosen], size, binary)
    return targets


def _from_polygons(
    masks: EncodedMasks, boxes: Tensor, matched_idxs: Tensor, size: int, binary: bool
) -> Tensor:
    instances, of_box = np.unique(matched_idxs.numpy(), return_inverse=True)
    corners: FloatArray = boxes.numpy()
    if binary:
        polygons = [masks.polygons(instance) for instance in instances]
        return _rasterized([polygons[instance] for instance in of_box], corners, size)
    low, high = corners[:, :2], np.maximum(corners[:, 2:], corners[:, :2] + _LEAST_SIDE)
    return polygon_coverage(
        [masks.segmentations[instance] for instance in instances],
        of_box,
        np.concatenate([low, high], axis=1),
        size,
        masks.x_map,
        masks.y_map,
    )


def _from_rles(masks: EncodedMasks, boxes: Tensor, matched_idxs: Tensor, size: int, binary: bool) -> Tensor:
    """Compute aligned targets of RLEs, sampled at the resolution of the annotated image."""
    x = masks.x_map.inverse(boxes[:, 0::2]).float().sort(dim=1).values
    y = masks.y_map.inverse(boxes[:, 1::2]).float().sort(dim=1).values
    height, width = masks.source_size
    rows = AxisSampling.of(y[:, 0], y[:, 1], height, size, aligned=True)
    columns = AxisSampling.of(x[:, 0], x[:, 1], width, size, aligned=True)
    runs = {index: masks.runs(index) for index in set(matched_idxs.tolist())}
    targets = roi_align_runs([runs[index] for index in matched_idxs.tolist()], rows, columns)
    if masks.x_map.scale < 0:
        targets = targets.flip(2)
    if masks.y_map.scale < 0:
        targets = targets.flip(1)
    return _thresholded(targets) if binary else targets


def _thresholded(targets: Tensor) -> Tensor:
    return (targets >= 0.5).float()


def _rasterized(polygon_sets: list[list[FloatArray]], boxes: FloatArray, size: int) -> Tensor:
    """Compute binary targets (P, M, M) with pycocotools' rasterizer, on the grid of each box."""
    targets = np.zeros((len(polygon_sets), size, size), dtype=np.float32)
    for roi, (polygons, (x1, y1, x2, y2)) in enumerate(zip(polygon_sets, boxes, strict=True)):
        # Detectron2 also limits the sides of a box to at least 0.1 px here.
        scale = np.array([size / max(x2 - x1, 0.1), size / max(y2 - y1, 0.1)])
        in_box = [(polygon - (x1, y1)) * scale for polygon in polygons]
        targets[roi] = rasterize_polygons(in_box, size, size)
    return torch.from_numpy(targets)
