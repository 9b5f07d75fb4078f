"""Points of objects in the coordinates of RoIs."""

from __future__ import annotations

import torch
from torch import Tensor


def points_in_boxes(points: Tensor, labels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Bring labelled points of an image into the coordinates of boxes.

    Args:
        points: (P, K, 2), x and y in px of the image.
        labels: (P, K): 1 inside the object, 0 outside, -1 none.
        boxes: (P, 4), xyxy in px.

    Returns:
        (P, K, 2), x and y in [0, 1] of each box where the point lies in it; and the labels, -1 where it does not.

    Source: Cheng et al., Pointly-supervised instance segmentation, 2021, arXiv:2104.06404; Detectron2's PointSup.
    """
    low, sides = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None]
    coords = (points - low) / sides.clamp(min=torch.finfo(boxes.dtype).tiny)
    outside = ((coords < 0) | (coords > 1)).any(dim=2)
    return coords, labels.masked_fill(outside, -1)
