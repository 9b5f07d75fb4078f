"""The box losses, and `BoxRegression`, the argument of a box term. Shapes: see `maskloss.losses`."""

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
    """The predicted and target boxes of a batch's positives, the argument of a box term.

    A term reads the encoded deltas or the decoded boxes. Boxes are decoded once, on first use.

    Attributes:
        deltas: (P, 4) predicted (dx, dy, dw, dh), encoded with the coder's weights.
        target_deltas: (P, 4) target deltas.
        decode: (P, 4) deltas -> (P, 4) boxes, xyxy in px, relative to the P positive anchors or proposals.

    Raises:
        ValueError: shapes differ; or, when `boxes` or `target_boxes` are read, `decode` is None.

    Example:
        >>> import torch
        >>> anchors = torch.tensor([[0., 0., 10., 10.]])
        >>> regression = BoxRegression(torch.ones(1, 4), torch.zeros(1, 4), decode=lambda deltas: anchors + deltas)
        >>> regression.boxes, regression.target_boxes
        (tensor([[ 1.,  1., 11., 11.]]), tensor([[ 0.,  0., 10., 10.]]))
    """

    deltas: Tensor
    target_deltas: Tensor
    decode: Callable[[Tensor], Tensor] | None = None
    # torch.compile cannot trace the lock of functools.cached_property.
    _boxes: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _target_boxes: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_same_shape(deltas=self.deltas, target_deltas=self.target_deltas)

    @property
    def boxes(self) -> Tensor:
        """(P, 4) predicted boxes, xyxy in px, with gradients to `deltas`."""
        # Boxes that were first decoded under `no_grad` have no gradients, so they are decoded again.
        needs_gradients = torch.is_grad_enabled() and self.deltas.requires_grad
        if self._boxes is None or (needs_gradients and not self._boxes.requires_grad):
            object.__setattr__(self, "_boxes", self._decode(self.deltas))
        return cast(Tensor, self._boxes)

    @property
    def target_boxes(self) -> Tensor:
        """(P, 4) matched ground-truth boxes, xyxy in px."""
        if self._target_boxes is None:
            object.__setattr__(self, "_target_boxes", self._decode(self.target_deltas))
        return cast(Tensor, self._target_boxes)

    def _decode(self, deltas: Tensor) -> Tensor:
        if self.decode is None:
            raise ValueError("this BoxRegression was made without `decode`, so it has no boxes")
        return self.decode(deltas)


class BoxLoss(LossModule):
    """A box loss: a term for `MaskRCNNLoss(box=, rpn_box=)`."""

    def __init__(self, function: Callable[..., Tensor], **knobs: Any) -> None:
        no_boxes = torch.zeros(0, 4)
        super().__init__(function, BoxRegression(no_boxes, no_boxes, lambda deltas: deltas), **knobs)

    def forward(self, regression: BoxRegression) -> Tensor:
        """Compute the loss of the P positives of `regression`."""
        loss: Tensor = self.function(regression, **self.knobs)
        return loss


def box_smooth_l1_loss(regression: BoxRegression, *, beta: float, reduction: Reduction = "none") -> Tensor:
    r"""Compute the smooth L1 loss of the encoded box deltas, summed over the four coordinates.

    With d = |deltas - target_deltas|, the loss of a coordinate is d² / (2 β) where d < β, and d - β/2 elsewhere.

    Args:
        regression: the P positives; only the deltas are read.
        beta: β >= 0, in units of the encoded deltas. 0 is plain L1. The libraries differ: torchvision has 1/9,
            Fast R-CNN and matterport have 1, Detectron2 has 0.
        reduction: "none" returns (P,); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0. P = 0 returns shape (0,), or 0 when reduced; both still backpropagate.

    Raises:
        ValueError: beta < 0.

    Example:
        >>> import torch
        >>> regression = BoxRegression(torch.tensor([[0., 0., 2., .5]]), torch.zeros(1, 4))
        >>> box_smooth_l1_loss(regression, beta=1.0)  # (2 - 1/2) + 0.5² / 2
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
    r"""Compute the balanced L1 loss of the encoded box deltas, summed over the four coordinates.

    With d = |deltas - target_deltas| and b = e^(γ/α) - 1, the loss of a coordinate is
    (α/b) (b d + 1) ln(b d / β + 1) - α d where d < β, and γ d + γ/b - α β elsewhere. Small errors get a larger
    share of the gradient than in a smooth L1 loss whose slope rises to the same γ.

    Args:
        regression: the P positives; only the deltas are read.
        alpha: α > 0; a lower α gives small errors more of the gradient.
        gamma: γ > 0, the slope from β on.
        beta: β in (0, 1], in units of the encoded deltas. The paper has 1. Below 1 the slope drops to γ at β; above 1 a
            perfect box would not have the lowest loss.
        reduction: "none" returns (P,); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0. P = 0 returns shape (0,), or 0 when reduced.

    Raises:
        ValueError: a knob is out of its range, or γ/α is above 80, for which e^(γ/α) overflows float32.

    Example:
        >>> import torch
        >>> regression = BoxRegression(torch.tensor([[2., 0., 0., 0.]]), torch.zeros(1, 4))
        >>> box_balanced_l1_loss(regression)  # 1.5 · 2 + 1.5 / (e³ - 1) - 0.5
        tensor([2.5786])

    Source: Pang et al., Libra R-CNN, 2019, arXiv:1904.02701, equations 7 and 8; β as in mmdetection.
    """
    check_positive(alpha=alpha, gamma=gamma, beta=beta)
    check_in_range(0, 1, beta=beta)
    if gamma / alpha > 80:
        raise ValueError(f"gamma / alpha must be <= 80, got gamma={gamma:g} and alpha={alpha:g}")
    deltas, targets = at_least_float32(regression.deltas), at_least_float32(regression.target_deltas)
    d = (deltas - targets).abs()
    b = math.expm1(gamma / alpha)
    # Above β, b d / β may overflow, and the gradient of a value that `where` discards would be NaN.
    d_near = d.clamp(max=beta)
    near = alpha / b * (b * d_near + 1) * (b * d_near / beta + 1).log() - alpha * d_near
    far = gamma * d + gamma / b - alpha * beta
    return reduced(torch.where(d < beta, near, far).sum(dim=1), reduction)


class BoxBalancedL1Loss(BoxLoss):
    """`box_balanced_l1_loss` with its α, γ and β."""

    def __init__(
        self, alpha: float = 0.5, gamma: float = 1.5, beta: float = 1.0, reduction: Reduction = "none"
    ) -> None:
        super().__init__(box_balanced_l1_loss, alpha=alpha, gamma=gamma, beta=beta, reduction=reduction)


def _boxes_and_targets(regression: BoxRegression) -> tuple[Tensor, Tensor]:
    """Return the predicted and the target boxes, (P, 4) each, at least float32."""
    return at_least_float32(regression.boxes), at_least_float32(regression.target_boxes)


#: Lower bound of a divisor in px² (union, hull, squared diagonal), for boxes without an area.
_LEAST_UNION = 1e-7
#: Lower bound of a side in px, where an aspect ratio is computed.
_LEAST_SIDE = 1e-6
#: Added to the divisor of CIoU's α, as in torchvision.
_ALPHA_EPSILON = 1e-7


def box_iou_loss(regression: BoxRegression, *, reduction: Reduction = "none") -> Tensor:
    r"""Compute the IoU loss of the decoded boxes, 1 - IoU.

    Boxes that do not overlap get no gradient; with `box_giou_loss` they do.

    Args:
        regression: the P positives; only the decoded boxes are read.
        reduction: "none" returns (P,); "sum" and "mean" return a scalar.

    Returns:
        At least float32, in [0, 1] per box, 0 is best. P = 0 returns shape (0,), or 0 when reduced.

    Raises:
        ValueError: the regression has no `decode`.

    Example:
        >>> import torch
        >>> boxes, targets = torch.tensor([[0., 0., 2., 2.]]), torch.tensor([[1., 1., 3., 3.]])
        >>> box_iou_loss(BoxRegression(boxes, targets, decode=lambda deltas: deltas))  # they share 1 px² of 7
        tensor([0.8571])

    Source: Yu et al., UnitBox, 2016, arXiv:1608.01471, which has -ln IoU; the linear form is from
    Rezatofighi et al., 2019, arXiv:1902.09630.
    """
    boxes, targets = _boxes_and_targets(regression)
    return reduced(1 - _iou(boxes, targets)[0], reduction)


def _iou(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU (P,) and union (P,) in px² of pairs of boxes (P, 4), without a host sync."""
    low = torch.maximum(boxes[:, :2], targets[:, :2])
    high = torch.minimum(boxes[:, 2:], targets[:, 2:])
    intersection = (high - low).clamp(min=0).prod(dim=1)
    union = _areas(boxes) + _areas(targets) - intersection
    return intersection / union.clamp(min=_LEAST_UNION), union


def _hull_sides(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return the width and height (P, 2) in px of the smallest box around each pair."""
    low = torch.minimum(boxes[:, :2], targets[:, :2])
    return torch.maximum(boxes[:, 2:], targets[:, 2:]) - low


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)


class BoxIoULoss(BoxLoss):
    """`box_iou_loss` as a term."""

    def __init__(self, reduction: Reduction = "none") -> None:
        super().__init__(box_iou_loss, reduction=reduction)


def box_giou_loss(regression: BoxRegression, *, reduction: Reduction = "none") -> Tensor:
    r"""Compute the generalized IoU loss of the decoded boxes, 1 - GIoU.

    With U the union of the two boxes and C the smallest box around them, loss = 1 - IoU + (|C| - |U|) / |C|.

    Args:
        regression: the P positives; only the decoded boxes are read.
        reduction: "none" returns (P,); "sum" and "mean" return a scalar.

    Returns:
        At least float32, in [0, 2] per box, 0 is best. P = 0 returns shape (0,), or 0 when reduced.

    Raises:
        ValueError: the regression has no `decode`.

    Example:
        >>> import torch
        >>> boxes, targets = torch.tensor([[0., 0., 2., 2.]]), torch.tensor([[1., 1., 3., 3.]])
        >>> box_giou_loss(BoxRegression(boxes, targets, decode=lambda deltas: deltas))  # 1 - 1/7 + (9 - 7) / 9
        tensor([1.0794])

    Source: Rezatofighi et al., Generalized Intersection over Union, 2019, arXiv:1902.09630, algorithm 1. Equal to
    `torchvision.ops.generalized_box_iou_loss`, but without the host sync of its boolean index.
    """
    boxes, targets = _boxes_and_targets(regression)
    iou, union = _iou(boxes, targets)
    hull = _hull_sides(boxes, targets).prod(dim=1)
    return reduced(1 - iou + (hull - union) / hull.clamp(min=_LEAST_UNION), reduction)


class BoxGIoULoss(BoxLoss):
    """`box_giou_loss` as a term."""

    def __init__(self, reduction: Reduction = "none") -> None:
        super().__init__(box_giou_loss, reduction=reduction)


def box_diou_loss(regression: BoxRegression, *, reduction: Reduction = "none") -> Tensor:
    r"""Compute the distance IoU loss of the decoded boxes.

    With d the distance of the two centers and c the diagonal of the smallest box around both,
    loss = 1 - IoU + d² / c².

    Args:
        regression: the P positives; only the decoded boxes are read.
        reduction: "none" returns (P,); "sum" and "mean" return a scalar.

    Returns:
        At least float32, in [0, 2] per box, 0 is best. P = 0 returns shape (0,), or 0 when reduced.

    Raises:
        ValueError: the regression has no `decode`.

    Example:
        >>> import torch
        >>> boxes, targets = torch.tensor([[0., 0., 2., 2.]]), torch.tensor([[1., 1., 3., 3.]])
        >>> box_diou_loss(BoxRegression(boxes, targets, decode=lambda deltas: deltas))  # 1 - 1/7 + 2/18
        tensor([0.9683])

    Source: Zheng et al., Distance-IoU loss, 2019, arXiv:1911.08287, equation 7. Equal to
    `torchvision.ops.distance_box_iou_loss`, but without the host sync of its boolean index.
    """
    return reduced(_distance_iou_loss(*_boxes_and_targets(regression)), reduction)


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
    r"""Compute the complete IoU loss of the decoded boxes: the distance IoU loss plus a term for the aspect ratio.

    With v = (4/π²) (arctan(w_t/h_t) - arctan(w/h))² and α = v / (1 - IoU + v), loss = DIoU loss + α v. No gradient
    flows through α.

    Args:
        regression: the P positives; only the decoded boxes are read.
        reduction: "none" returns (P,); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0 per box, 0 is best. P = 0 returns shape (0,), or 0 when reduced.

    Raises:
        ValueError: the regression has no `decode`.

    Example:
        >>> import torch
        >>> boxes, targets = torch.tensor([[0., 0., 2., 2.]]), torch.tensor([[0., 0., 2., 1.]])
        >>> regression = BoxRegression(boxes, targets, decode=lambda deltas: deltas)
        >>> box_diou_loss(regression), box_ciou_loss(regression)  # 1/2 + 0.5²/8, plus 0.0420² / (1/2 + 0.0420)
        (tensor([0.5312]), tensor([0.5345]))

    Source: Zheng et al., Distance-IoU loss, 2019, arXiv:1911.08287, equation 10. Equal to
    `torchvision.ops.complete_box_iou_loss`, but also finite where a side has shrunk to 0.
    """
    boxes, targets = _boxes_and_targets(regression)
    distance = _distance_iou_loss(boxes, targets)
    aspect = 4 / math.pi**2 * (_aspect_angle(targets) - _aspect_angle(boxes)).square()
    with torch.no_grad():
        # For equal boxes all three are 0, and 1 - IoU may be rounded to below 0.
        weight = aspect / (box_iou_loss(regression).clamp(min=0) + aspect + _ALPHA_EPSILON)
    return reduced(distance + weight * aspect, reduction)


def _aspect_angle(boxes: Tensor) -> Tensor:
    """Return arctan(width / height), (P,)."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).clamp(min=_LEAST_SIDE).unbind(dim=1)
    return torch.atan2(width, height)


class BoxCIoULoss(BoxLoss):
    """`box_ciou_loss` as a term."""

    def __init__(self, reduction: Reduction = "none") -> None:
        super().__init__(box_ciou_loss, reduction=reduction)
