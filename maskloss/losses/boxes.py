"""Box regression: what a box term receives, and the box losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch.nn.functional as F
import torchvision.ops
from torch import Tensor, nn

from maskloss.losses.conventions import Reduction, at_least_float32, reduced, same_shape


@dataclass(frozen=True)
class BoxRegression:
    """The positives of a batch, as a box term sees them.

    A term reads the encoded deltas, or the decoded boxes, which are computed on first use only.

    Attributes:
        deltas: (P, 4) predicted (dx, dy, dw, dh), encoded with the coder's weights.
        target_deltas: (P, 4), what they should be.
        decode: (P, 4) deltas -> (P, 4) boxes, xyxy in px, relative to the anchors or proposals of these P.
    """

    deltas: Tensor
    target_deltas: Tensor
    decode: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        same_shape(deltas=self.deltas, target_deltas=self.target_deltas)

    @cached_property
    def boxes(self) -> Tensor:
        """(P, 4) predicted boxes, xyxy in px, with gradients to `deltas`."""
        return self._decoded(self.deltas)

    @cached_property
    def target_boxes(self) -> Tensor:
        """(P, 4) matched ground-truth boxes, xyxy in px."""
        return self._decoded(self.target_deltas)

    def _decoded(self, deltas: Tensor) -> Tensor:
        if self.decode is None:
            raise ValueError("this BoxRegression was made without `decode`, so it has no boxes")
        return self.decode(deltas)


def box_smooth_l1_loss(regression: BoxRegression, *, beta: float, reduction: Reduction = "none") -> Tensor:
    r"""Smooth L1 of the encoded box deltas, summed over the four coordinates.

    With d = |deltas - target_deltas|, each coordinate costs d² / (2 β) where d < β, and d - β/2 elsewhere.

    Args:
        regression: the P positives; only its deltas are read.
        beta: β >= 0, in units of the encoded deltas. 0 is plain L1. The libraries differ: torchvision 1/9,
            Fast R-CNN and matterport 1, Detectron2 0.
        reduction: "none" gives (P,); "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0. P = 0 gives shape (0,), or 0 when reduced; both still backpropagate.

    Raises:
        ValueError: beta < 0.

    Example:
        >>> import torch
        >>> box_smooth_l1_loss(BoxRegression(torch.tensor([[0., 0., 2., .5]]), torch.zeros(1, 4)), beta=1.)
        tensor([1.6250])

    Source: Girshick, Fast R-CNN, 2015, arXiv:1504.08083, equation 3, which has β = 1.
    """
    if beta < 0:
        raise ValueError(f"beta must be >= 0, got {beta}")
    deltas, targets = at_least_float32(regression.deltas), at_least_float32(regression.target_deltas)
    return reduced(F.smooth_l1_loss(deltas, targets, beta=beta, reduction="none").sum(dim=1), reduction)


class BoxSmoothL1Loss(nn.Module):
    """`box_smooth_l1_loss` with its β."""

    def __init__(self, beta: float, reduction: Reduction = "none") -> None:
        super().__init__()
        if beta < 0:
            raise ValueError(f"beta must be >= 0, got {beta}")
        self.beta = beta
        self.reduction = reduction

    def extra_repr(self) -> str:
        """Show β."""
        return f"beta={self.beta:g}"

    def forward(self, regression: BoxRegression) -> Tensor:
        """See `box_smooth_l1_loss`."""
        return box_smooth_l1_loss(regression, beta=self.beta, reduction=self.reduction)


def box_giou_loss(regression: BoxRegression, *, reduction: Reduction = "none") -> Tensor:
    r"""Generalised IoU loss of the decoded boxes, 1 - GIoU.

    Args:
        regression: the P positives; its decoded boxes are read.
        reduction: "none" gives (P,); "sum" and "mean" give a scalar.

    Returns:
        At least float32, in [0, 2] per box, 0 is best. P = 0 gives shape (0,), or 0 when reduced.

    Raises:
        ValueError: the regression has no `decode`.

    Source: Rezatofighi et al., Generalized Intersection over Union, 2019, arXiv:1902.09630; computed by
    `torchvision.ops.generalized_box_iou_loss`.
    """
    boxes, targets = at_least_float32(regression.boxes), at_least_float32(regression.target_boxes)
    return reduced(torchvision.ops.generalized_box_iou_loss(boxes, targets, reduction="none"), reduction)


class BoxGIoULoss(nn.Module):
    """`box_giou_loss` as a term."""

    def __init__(self, reduction: Reduction = "none") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, regression: BoxRegression) -> Tensor:
        """See `box_giou_loss`."""
        return box_giou_loss(regression, reduction=self.reduction)
