"""Non-maximum suppression that `torch.export` can trace, and with one synchronization."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import boxes as torchvision_boxes
from torchvision.ops import nms


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Suppress boxes that overlap with a better box of their group.

    It is torchvision's `batched_nms`, except in `torch.export`: torchvision chooses between two implementations by the
    number of boxes, which is unknown there, so the export always moves the groups apart.

    Args:
        boxes: (K, 4), xyxy, >= 0.
        scores: (K,).
        groups: (K,), such as the class of each box.
        iou_threshold: minimum IoU of a suppressed box.

    Returns:
        Indices of the boxes that remain, int64, by descending score.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4]])
        >>> batched_nms(boxes, torch.tensor([0.5, 0.75, 0.25]), torch.tensor([1, 1, 2]), 0.5)
        tensor([1, 2])
    """
    if not torch.compiler.is_exporting():
        # Looked up at each call, as in torchvision, so that a user's replacement is called.
        kept: Tensor = torchvision_boxes.batched_nms(boxes, scores, groups, iou_threshold)
        return kept
    # A zero is added because the maximum of no boxes is undefined.
    moved = _moved_apart(boxes, groups, torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max())
    # The export assumes that NMS keeps at least two boxes: these are worse than all others, and overlap with none.
    outside = boxes.new_tensor([[-4.0, -4.0, -3.0, -3.0], [-2.0, -2.0, -1.0, -1.0]])
    worst = scores.new_tensor([-1.0, -2.0])
    remaining: Tensor = nms(torch.cat([moved, outside]), torch.cat([scores, worst]), iou_threshold)
    return remaining[: remaining.shape[0] - 2]


def batched_nms_once(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Suppress boxes as `batched_nms` does, with one synchronization whatever the number of boxes and groups.

    torchvision suppresses many boxes group by group, and synchronizes a few times for each group. This always moves the
    groups apart. The coordinates become larger, so that IoUs within rounding errors of the threshold may be decided
    differently.

    Args:
        boxes: (K, 4), xyxy, >= 0, K >= 1.
        scores: (K,).
        groups: (K,), such as the level of each box.
        iou_threshold: minimum IoU of a suppressed box.

    Returns:
        Indices of the boxes that remain, int64, by descending score.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4]])
        >>> batched_nms_once(boxes, torch.tensor([0.5, 0.75, 0.25]), torch.tensor([1, 1, 2]), 0.5)
        tensor([1, 2])
    """
    kept: Tensor = nms(_moved_apart(boxes, groups, boxes.max()), scores, iou_threshold)
    return kept


def _moved_apart(boxes: Tensor, groups: Tensor, farthest: Tensor) -> Tensor:
    """Move the boxes of each group so far that they overlap with none of another group."""
    return boxes + (groups.to(boxes) * (farthest + 1))[:, None]
