"""Box regression: what a box term receives, and the box losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from maskloss.losses.arithmetic import at_least_float32, reduced
from maskloss.losses.checks import (
    Reduction,
    check_in_range,
    check_positive,
    check_same_shape,
)
from maskloss.losses.modules import LossModule


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
    # Not by functools.cached_property, whose lock torch.compile cannot enter.
    _boxes: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _target_boxes: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_same_shape(deltas=self.deltas, target_deltas=self.target_deltas)

    @property
    def boxes(self) -> Tensor:
        """(P, 4) predicted boxes, xyxy in px, with gradients to `deltas`."""
        # Boxes that were decoded under `no_grad` first have no gradients to give to who reads them next.
        wants_gradients = torch.is_grad_enabled() and self.deltas.requires_grad
        if self._boxes is None or (wants_gradients and not self._boxes.requires_grad):
            object.__setattr__(self, "_boxes", self._decoded(self.deltas))
        return cast(Tensor, self._boxes)

    @property
    def target_boxes(self) -> Tensor:
        """(P, 4) matched ground-truth boxes, xyxy in px."""
        if self._target_boxes is None:
            object.__setattr__(self, "_target_boxes", self._decoded(self.target_deltas))
        return cast(Tensor, self._target_boxes)

    def _decoded(self, deltas: Tensor) -> Tensor:
        if self.decode is None:
            raise ValueError("this BoxRegression was made without `decode`, so it has no boxes")
        return self.decode(deltas)


class BoxLoss(LossModule):
    """A box loss: a term for `MaskRCNNLoss(box=, rpn_box=)`."""

    def __init__(self, function: Callable[..., Tensor], **knobs: Any) -> None:
        no_boxes = torch.zeros(0, 4)
        super().__init__(function, BoxRegression(no_boxes, no_boxes, lambda deltas: deltas), **knobs)

    def forward(self, regression: BoxRegression) -> Tensor:
        """Compute the loss of the P positives."""
        loss: Tensor = self.function(regression, **self.knobs)
        return loss


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
    check_in_range(0, beta=beta)
    deltas, targets = at_least_float32(regression.deltas), at_least_float32(regression.target_deltas)
    return reduced(F.smooth_l1_loss(deltas, targets, beta=beta, reduction="none").sum(dim=1), reduction)


class BoxSmoothL1Loss(BoxLoss):
    """`box_smooth_l1_loss` with its β."""

    def __init__(self, beta: float, reduction: Reduction = "none") -> None:
        super().__init__(box_smooth_l1_loss, beta=beta, reduction=reduction)


def box_balanced_l1_loss(
    regression: BoxRegression,
    *,
    alpha: float = 0.5,
    gamma: float = 1.5,
    beta: float = 1.0,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Balanced L1 of the encoded box deltas, summed over the four coordinates.

    With d = |deltas - target_deltas| and b = e^(γ/α) - 1, a coordinate costs
    (α/b) (b d + 1) ln(b d / β + 1) - α d where d < β, and γ d + γ/b - α β elsewhere. Small errors get a larger
    part of the gradient than in smooth L1, whose slope rises to the same γ.

    Args:
        regression: the P positives; only its deltas are read.
        alpha: α > 0; the lower, the more of the gradient small errors get.
        gamma: γ > 0, the largest slope.
        beta: β in (0, 1], in units of the encoded deltas. Published with 1; below, the slope has a jump at β, and
            above a perfect box would not be the best.
        reduction: "none" gives (P,); "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0. P = 0 gives shape (0,), or 0 when reduced.

    Raises:
        ValueError: a knob is out of its range, or γ/α is above 80, whose exponential float32 cannot hold.

    Source: Pang et al., Libra R-CNN, 2019, arXiv:1904.02701, equations 7 and 8; with β as mmdetection has it.
    """
    check_positive(alpha=alpha, gamma=gamma, beta=beta)
    check_in_range(0, 1, beta=beta)
    if gamma / alpha > 80:
        raise ValueError(f"gamma / alpha must be <= 80, got gamma={gamma:g} and alpha={alpha:g}")
    deltas, targets = at_least_float32(regression.deltas), at_least_float32(regression.target_deltas)
    d = (deltas - targets).abs()
    b = math.expm1(gamma / alpha)
    near = alpha / b * (b * d + 1) * (b * d / beta + 1).log() - alpha * d
    far = gamma * d + gamma / b - alpha * beta
    return reduced(torch.where(d < beta, near, far).sum(dim=1), reduction)


class BoxBalancedL1Loss(BoxLoss):
    """`box_balanced_l1_loss` with its α, γ and β."""

    def __init__(
        self, alpha: float = 0.5, gamma: float = 1.5, beta: float = 1.0, reduction: Reduction = "none"
    ) -> None:
        super().__init__(box_balanced_l1_loss, alpha=alpha, gamma=gamma, beta=beta, reduction=reduction)


def _decoded(regression: BoxRegression) -> tuple[Tensor, Tensor]:
    """Predicted and target boxes, (P, 4) each, at least float32."""
    return at_least_float32(regression.boxes), at_least_float32(regression.target_boxes)


#: Under a union of two boxes, in px², for boxes that have no area.
_LEAST_UNION = 1e-7
#: Of a side, in px, where a box's aspect ratio is asked for.
_LEAST_SIDE = 1e-6
#: Under CIoU's α, as in torchvision.
_ALPHA_EPSILON = 1e-7


def box_iou_loss(regression: BoxRegression, *, reduction: Reduction = "none") -> Tensor:
    r"""IoU loss of the decoded boxes, 1 - IoU. Boxes that do not meet get no gradient; GIoU's do.

    Args:
        regression: the P positives; its decoded boxes are read.
        reduction: "none" gives (P,); "sum" and "mean" give a scalar.

    Returns:
        At least float32, in [0, 1] per box, 0 is best. P = 0 gives shape (0,), or 0 when reduced.

    Raises:
        ValueError: the regression has no `decode`.

    Source: Yu et al., UnitBox, 2016, arXiv:1608.01471, which has -ln IoU; the linear form is that of
    Rezatofighi et al., 2019, arXiv:1902.09630.
    """
    boxes, targets = _decoded(regression)
    return reduced(1 - _iou(boxes, targets)[0], reduction)


def _iou(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and union (P,) in px² of boxes (P, 4) pair by pair, without an index that a device would wait for."""
    low = torch.maximum(boxes[:, :2], targets[:, :2])
    high = torch.minimum(boxes[:, 2:], targets[:, 2:])
    intersection = (high - low).clamp(min=0).prod(dim=1)
    union = _areas(boxes) + _areas(targets) - intersection
    return intersection / union.clamp(min=_LEAST_UNION), union


def _hull_sides(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return width and height (P, 2) in px of the smallest box around both."""
    low = torch.minimum(boxes[:, :2], targets[:, :2])
    return torch.maximum(boxes[:, 2:], targets[:, 2:]) - low


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)


class BoxIoULoss(BoxLoss):
    """`box_iou_loss` as a term."""

    def __init__(self, reduction: Reduction = "none") -> None:
        super().__init__(box_iou_loss, reduction=reduction)


def box_giou_loss(regression: BoxRegression, *, reduction: Reduction = "none") -> Tensor:
    r"""Generalised IoU loss of the decoded boxes, 1 - GIoU.

    Args:
        regression: the P positives; its decoded boxes are read.
        reduction: "none" gives (P,); "sum" and "mean" give a scalar.

    Returns:
        At least float32, in [0, 2] per box, 0 is best. P = 0 gives shape (0,), or 0 when reduced.

    Raises:
        ValueError: the regression has no `decode`.

    Source: Rezatofighi et al., Generalized Intersection over Union, 2019, arXiv:1902.09630, algorithm 1. As
    `torchvision.ops.generalized_box_iou_loss`, which indexes by what overlaps, for which a device is waited for.
    """
    boxes, targets = _decoded(regression)
    iou, union = _iou(boxes, targets)
    hull = _hull_sides(boxes, targets).prod(dim=1)
    return reduced(1 - iou + (hull - union) / hull.clamp(min=_LEAST_UNION), reduction)


class BoxGIoULoss(BoxLoss):
    """`box_giou_loss` as a term."""

    def __init__(self, reduction: Reduction = "none") -> None:
        super().__init__(box_giou_loss, reduction=reduction)


def box_diou_loss(regression: BoxRegression, *, reduction: Reduction = "none") -> Tensor:
    r"""Distance IoU loss of the decoded boxes: 1 - IoU + d² / c², with the centres d and the hull's corners c apart.

    Args:
        regression: the P positives; its decoded boxes are read.
        reduction: "none" gives (P,); "sum" and "mean" give a scalar.

    Returns:
        At least float32, in [0, 2] per box, 0 is best. P = 0 gives shape (0,), or 0 when reduced.

    Raises:
        ValueError: the regression has no `decode`.

    Source: Zheng et al., Distance-IoU loss, 2019, arXiv:1911.08287, equation 7. As
    `torchvision.ops.distance_box_iou_loss`, without its index by what overlaps.
    """
    return reduced(_distance_iou_loss(*_decoded(regression)), reduction)


def _distance_iou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - IoU + d² / c², (P,)."""
    iou, _ = _iou(boxes, targets)
    diagonal = _hull_sides(boxes, targets).square().sum(dim=1)
    between_centers = (
        ((boxes[:, :2] + boxes[:, 2:] - targets[:, :2] - targets[:, 2:]) / 2).square().sum(dim=1)
    )
    return 1 - iou + between_centers / diagonal.clamp(min=_LEAST_UNION)


class BoxDIoULoss(BoxLoss):
    """`box_diou_loss` as a term."""

    def __init__(self, reduction: Reduction = "none") -> None:
        super().__init__(box_diou_loss, reduction=reduction)


def box_ciou_loss(regression: BoxRegression, *, reduction: Reduction = "none") -> Tensor:
    r"""Complete IoU loss of the decoded boxes: the distance IoU loss plus a term for the aspect ratio.

    With v = (4/π²) (arctan(w_t/h_t) - arctan(w/h))² and α = v / (1 - IoU + v), which is held constant in the
    gradient, loss = DIoU loss + α v.

    Args:
        regression: the P positives; its decoded boxes are read.
        reduction: "none" gives (P,); "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0 per box, 0 is best. P = 0 gives shape (0,), or 0 when reduced.

    Raises:
        ValueError: the regression has no `decode`.

    Source: Zheng et al., Distance-IoU loss, 2019, arXiv:1911.08287, equation 10. As
    `torchvision.ops.complete_box_iou_loss`, and finite where a side has shrunk to nothing, which that is not.
    """
    boxes, targets = _decoded(regression)
    distance = _distance_iou_loss(boxes, targets)
    aspect = 4 / math.pi**2 * (_aspect_angle(targets) - _aspect_angle(boxes)).square()
    with torch.no_grad():
        # Of boxes that agree all three are 0, and 1 - IoU may be rounded to less.
        weight = aspect / (box_iou_loss(regression).clamp(min=0) + aspect + _ALPHA_EPSILON)
    return reduced(distance + weight * aspect, reduction)


def _aspect_angle(boxes: Tensor) -> Tensor:
    """arctan(width / height), (P,)."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).clamp(min=_LEAST_SIDE).unbind(dim=1)
    return torch.atan2(width, height)


class BoxCIoULoss(BoxLoss):
    """`box_ciou_loss` as a term."""

    def __init__(self, reduction: Reduction = "none") -> None:
        super().__init__(box_ciou_loss, reduction=reduction)
