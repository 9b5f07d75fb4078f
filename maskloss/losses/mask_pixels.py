"""Mask losses that are sums over pixels; those of whole areas are in `mask_overlap`.

Written for the M x M grid of each RoI, and as good for dense logits (N, C, H, W): all but the softmax reduce the
last two axes, and keep the others.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from maskloss.losses.arithmetic import at_least_float32, binary_cross_entropy, reduced, sigmoid_focal
from maskloss.losses.checks import Reduction, check_in_range, check_same_shape
from maskloss.losses.modules import MaskLoss


def mask_bce_loss(mask_logits: Tensor, mask_targets: Tensor, *, reduction: Reduction = "none") -> Tensor:
    r"""Average binary cross-entropy over each RoI's mask.

    With p = sigmoid(mask_logits) and t = mask_targets, loss = -(1/M²) Σ t log p + (1 - t) log(1 - p).

    Args:
        mask_logits: (P, M, M), pre-sigmoid, channel of the RoI's own class (`select_class_masks`); or
            (..., H, W).
        mask_targets: of the same shape, in [0, 1]; soft values allowed (`maskloss.mask_targets`).
        reduction: "none" gives (P,), or (...); "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0 per RoI; for soft targets the best value is the targets' entropy. P = 0 gives
        shape (0,), or 0 when reduced; both still backpropagate.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> import torch
        >>> mask_bce_loss(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))
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
    r"""Binary cross-entropy in which positive pixels count α and negative ones β.

    With p = sigmoid(mask_logits) and t = mask_targets,
    loss = -(1/M²) Σ α t log p + β (1 - t) log(1 - p).

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: of the same shape, in [0, 1].
        positive_weight: α >= 0.
        negative_weight: β >= 0. α + β = 2 keeps the scale where both kinds are as many; one over twice each
            kind's share of the pixels lets both count alike.
        reduction: "none" gives (P,), or (...); "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0. Empty input gives an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ, or a weight is negative.

    Example:
        >>> import torch
        >>> mask_weighted_bce_loss(torch.zeros(1, 1, 2), torch.tensor([[[1., 0.]]]),
        ...                        positive_weight=3.0, negative_weight=1.0)
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
    r"""Average focal loss over each RoI's mask: pixels that are right already count less.

    With p_t = p t + (1 - p)(1 - t) and α_t = α t + (1 - α)(1 - t), a pixel costs α_t (1 - p_t)^γ BCE(p, t).

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: of the same shape, in [0, 1].
        alpha: α in [0, 1], of positive pixels; None for no such weights.
        gamma: γ >= 0; 0 is cross-entropy.
        reduction: "none" gives (P,), or (...); "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0. Empty input gives an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ, or a knob is out of its range.

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
    r"""Binary cross-entropy in which pixels near the boundary count more.

    With A t the mean of the targets over the window of a pixel, its weight is w = 1 + λ |A t - t|, and
    loss = Σ w BCE(p, t) / Σ w. Inside and outside w is 1, and at a straight boundary about 1 + λ / 2.

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: of the same shape, in [0, 1].
        boundary_weight: λ >= 0; 0 is cross-entropy.
        width: of the window in pixels, odd; 5 of 28 is about the 31 of 352 of the source's images, with a
            floor of a few pixels.
        reduction: "none" gives (P,), or (...); "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0. Empty input gives an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ, λ < 0, or the width is not a positive odd number.

    Source: Wei et al., F³Net, 2020, arXiv:1911.11445, the cross-entropy of its pixel position aware loss, with
    λ = 5. Windows at the border are averaged over what there is of them, where the source's code takes the outside
    for background: an object that the RoI cuts off has no boundary there.
    """
    check_same_shape(mask_logits=mask_logits, mask_targets=mask_targets)
    check_in_range(0, boundary_weight=boundary_weight)
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
    """`mask_boundary_bce_loss` with its λ and window."""

    def __init__(self, boundary_weight: float = 5.0, width: int = 5, reduction: Reduction = "none") -> None:
        super().__init__(
            mask_boundary_bce_loss, boundary_weight=boundary_weight, width=width, reduction=reduction
        )
