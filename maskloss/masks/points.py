"""Convert labeled points of objects to the coordinates of RoIs."""

from __future__ import annotations

import torch
from torch import Tensor


def points_in_boxes(points: Tensor, labels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Convert labeled points from image coordinates to coordinates relative to boxes.

    Args:
        points: (P, K, 2), x and y in px of the image.
        labels: (P, K): 1 inside the object, 0 outside, -1 no label.
        boxes: (P, 4), xyxy in px of the image.

    Returns:
        Points (P, K, 2), x and y relative to each box, in [0, 1] if the point lies in the box; and labels (P, K), set
        to -1 for points outside the box.

    Example:
        >>> points, labels = torch.tensor([[[3.0, 4.0], [9.0, 4.0]]]), torch.tensor([[1, 0]])
        >>> points_in_boxes(points, labels, torch.tensor([[2.0, 2.0, 6.0, 6.0]]))
        (tensor([[[0.2500, 0.5000],
                 [1.7500, 0.5000]]]), tensor([[ 1, -1]]))

    Source: Cheng et al., Pointly-supervised instance segmentation, 2021, arXiv:2104.06404; Detectron2's PointSup.
    """
    low, sides = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None]
    coords = (points - low) / sides.clamp(min=torch.finfo(boxes.dtype).tiny)
    outside = ((coords < 0) | (coords > 1)).any(dim=2)
    return coords, labels.masked_fill(outside, -1)
