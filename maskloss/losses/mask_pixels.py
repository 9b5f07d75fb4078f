"""Mask losses that are sums over pixels; those that compare areas are in `mask_overlap`.

All take the M x M grid of each RoI, or dense logits (N, C, H, W): they reduce the last two axes and keep the others.
Shapes: see `maskloss.losses`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from maskloss.losses.arithmetic import at_least_float32, binary_cross_entropy, reduced, sigmoid_focal
from maskloss.losses.checks import Reduction, check_in_range, check_integer, check_same_shape
from maskloss.losses.modules import MaskLoss


def mask_bce_loss(mask_logits: Tensor, mask_targets: Tensor, *, reduction: Reduction = "none") -> Tensor:
    r"""Compute the mean binary cross-entropy over each RoI's mask.

    With p = sigmoid(mask_logits) and t = mask_targets, loss = -(1/M²) Σ t log p + (1 - t) log(1 - p).

    Args:
        mask_logits: (P, M, M), pre-sigmoid, the channel of the RoI's own class (`select_class_masks`); or (..., H, W).
        mask_targets: same shape as the logits, in [0, 1]; soft values allowed (`maskloss.mask_targets`).
        reduction: "none" returns (P,), or (...); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0; for soft targets the lowest value is the entropy of the targets. P = 0 returns
        shape (0,), or 0 when reduced; both still backpropagate.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> import torch
        >>> mask_bce_loss(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))  # ln 2
        tensor([0.6931])

    Source: He et al., Mask R-CNN, 2017, arXiv:1703.06870, section 3.
    """
    check_same_shape(mask_logits=mask_logits, mask_targets=mask_targets)
    mask_logits = at_least_float32(mask_logits)
    per_pixel = F.binary_cross_entropy_with_logits(
        mask_logits, mask_targets.to(mask_logits.dtype), reduction="none"
    )  # (P, M, M)
    return reduced(per_pixel.mean(dim=(-2, -1)), reduction)


class MaskBCELoss(MaskLoss):
    """`mask_bce_loss` as a term."""

    def __init__(self, reduction: Reduction = "none") -> None:
        super().__init__(mask_bce_loss, reduction=reduction)


def mask_weighted_bce_loss(
    mask_logits: Tensor,
    mask_targets: Tensor,
    *,
    positive_weight: float,
    negative_weight: float,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Compute the mean binary cross-entropy with weights α for positive and β for negative pixels.

    With p = sigmoid(mask_logits) and t = mask_targets,
    loss = -(1/M²) Σ α t log p + β (1 - t) log(1 - p).

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: same shape as the logits, in [0, 1].
        positive_weight: α >= 0.
        negative_weight: β >= 0. If half of the pixels are positive, α + β = 2 keeps the scale of `mask_bce_loss`. If a
            share f is positive, α = 1 / (2 f) and β = 1 / (2 (1 - f)) give both kinds the same total weight.
        reduction: "none" returns (P,), or (...); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0. Empty input returns an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ, or a weight is negative.

    Example:
        >>> import torch
        >>> target = torch.tensor([[[1., 0.]]])
        >>> mask_weighted_bce_loss(
        ...     torch.zeros(1, 1, 2), target, positive_weight=3.0, negative_weight=1.0
        ... )  # (3 ln 2 + ln 2) / 2
        tensor([1.3863])

    Source: Xie and Tu, Holistically-nested edge detection, 2015, arXiv:1504.06375, equation 2.
    """
    check_same_shape(mask_logits=mask_logits, mask_targets=mask_targets)
    check_in_range(0, positive_weight=positive_weight, negative_weight=negative_weight)
    logits = at_least_float32(mask_logits)
    targets = mask_targets.to(logits.dtype)
    per_pixel = -(
        positive_weight * targets * F.logsigmoid(logits)
        + negative_weight * (1 - targets) * F.logsigmoid(-logits)
    )
    return reduced(per_pixel.mean(dim=(-2, -1)), reduction)


class MaskWeightedBCELoss(MaskLoss):
    """`mask_weighted_bce_loss` with its α and β."""

    def __init__(self, positive_weight: float, negative_weight: float, reduction: Reduction = "none") -> None:
        super().__init__(
            mask_weighted_bce_loss,
            positive_weight=positive_weight,
            negative_weight=negative_weight,
            reduction=reduction,
        )


def mask_focal_loss(
    mask_logits: Tensor,
    mask_targets: Tensor,
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Compute the mean focal loss over each RoI's mask, which gives well-classified pixels less weight.

    With p = sigmoid(mask_logits), t = mask_targets, p_t = p t + (1 - p)(1 - t) and α_t = α t + (1 - α)(1 - t), the
    loss of a pixel is α_t (1 - p_t)^γ BCE(p, t).

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: same shape as the logits, in [0, 1].
        alpha: α in [0, 1], the weight of positive pixels; negative ones have 1 - α. None for no weights.
        gamma: γ >= 0; 0 is cross-entropy.
        reduction: "none" returns (P,), or (...); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0. Empty input returns an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ, or a knob is out of its range.

    Example:
        >>> import torch
        >>> mask_focal_loss(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))  # 0.25 · (1/2)² · ln 2
        tensor([0.0433])

    Source: Lin et al., Focal loss for dense object detection, 2017, arXiv:1708.02002, equation 5, per pixel.
    """
    check_same_shape(mask_logits=mask_logits, mask_targets=mask_targets)
    check_in_range(0, 1, alpha=0.0 if alpha is None else alpha)
    check_in_range(0, gamma=gamma)
    logits = at_least_float32(mask_logits)
    per_pixel = sigmoid_focal(logits, mask_targets.to(logits.dtype), alpha, gamma)
    return reduced(per_pixel.mean(dim=(-2, -1)), reduction)


class MaskFocalLoss(MaskLoss):
    """`mask_focal_loss` with its α and γ."""

    def __init__(self, alpha: float | None = 0.25, gamma: float = 2.0, reduction: Reduction = "none") -> None:
        super().__init__(mask_focal_loss, alpha=alpha, gamma=gamma, reduction=reduction)


def mask_boundary_bce_loss(
    mask_logits: Tensor,
    mask_targets: Tensor,
    *,
    boundary_weight: float = 5.0,
    width: int = 5,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Compute the binary cross-entropy in which pixels near the boundary of the object have larger weights.

    With p = sigmoid(mask_logits), t = mask_targets and A t the mean of t over the window around a pixel, the weight of
    the pixel is w = 1 + λ |A t - t|, and loss = Σ w BCE(p, t) / Σ w. Away from the boundary w is 1; at a straight
    boundary it is about 1 + λ / 2.

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: same shape as the logits, in [0, 1].
        boundary_weight: λ >= 0; 0 is cross-entropy.
        width: width of the window in pixels, odd. The source has 31 in images of 352, which is 2.5 in a grid of 28;
            the default is wider, so that the window spans a few pixels.
        reduction: "none" returns (P,), or (...); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0. Empty input returns an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ, λ < 0, or the width is not a positive odd number.

    Example:
        >>> import torch
        >>> target = torch.tensor([[[0., 0., 0., 1.]]])  # with λ = 3 the weights are 1, 1, 2 and 2.5
        >>> logits = torch.tensor([[[-20., -20., 0., 20.]]])  # all right except the third pixel, which is at 1/2
        >>> mask_boundary_bce_loss(logits, target, boundary_weight=3.0, width=3)  # 2 ln 2 / 6.5
        tensor([0.2133])

    Source: Wei et al., F³Net, 2020, arXiv:1911.11445, the cross-entropy of its pixel position aware loss, with
    λ = 5. At the border, the source's code treats pixels outside of the grid as background. Here windows are averaged
    over the pixels inside the grid, because an object that the RoI cuts off has no boundary there.
    """
    check_same_shape(mask_logits=mask_logits, mask_targets=mask_targets)
    check_in_range(0, boundary_weight=boundary_weight)
    check_integer(width=width)
    if width < 1 or width % 2 == 0:
        raise ValueError(f"width must be a positive odd number of pixels, got {width}")
    logits = at_least_float32(mask_logits)
    targets = mask_targets.to(logits.dtype)
    planes = targets.reshape(-1, 1, *targets.shape[-2:])
    mean = F.avg_pool2d(planes, width, stride=1, padding=width // 2, count_include_pad=False)
    weights = 1 + boundary_weight * (mean.reshape(targets.shape) - targets).abs()
    per_pixel = binary_cross_entropy(logits, targets)
    return reduced((weights * per_pixel).sum(dim=(-2, -1)) / weights.sum(dim=(-2, -1)), reduction)


class MaskBoundaryBCELoss(MaskLoss):
    """`mask_boundary_bce_loss` with its λ and window width."""

    def __init__(self, boundary_weight: float = 5.0, width: int = 5, reduction: Reduction = "none") -> None:
        super().__init__(
            mask_boundary_bce_loss, boundary_weight=boundary_weight, width=width, reduction=reduction
        )
