"""Mask losses that compare areas instead of single pixels: Dice and its variants, Tversky, Lovász.

All take the M x M grid of each RoI, or dense logits (N, C, H, W): they reduce the last two axes and keep the others.
Shapes: see `maskloss.losses`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskloss.losses.arithmetic import at_least_float32, probabilities, reduced
from maskloss.losses.checks import (
    Reduction,
    check_in_range,
    check_positive,
    check_same_shape,
)
from maskloss.losses.modules import MaskLoss


def mask_dice_loss(
    mask_logits: Tensor, mask_targets: Tensor, *, smooth: float = 1.0, reduction: Reduction = "none"
) -> Tensor:
    r"""Compute the soft Dice loss of each RoI's mask.

    With p = sigmoid(mask_logits) and t = mask_targets, loss = 1 - (2 Σ p t + s) / (Σ p + Σ t + s).

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: same shape as the logits, in [0, 1].
        smooth: s > 0, in pixels; with it, the loss of an empty prediction for an empty target is 0.
        reduction: "none" returns (P,), or (...); "sum" and "mean" return a scalar.

    Returns:
        At least float32, in [0, 1], 0 is best for binary targets. Empty input returns an empty tensor, or 0 when
        reduced.

    Raises:
        ValueError: shapes differ, or smooth <= 0.

    Example:
        >>> import torch
        >>> mask_dice_loss(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))  # 1 - (2 · 2 + 1) / (2 + 4 + 1)
        tensor([0.2857])

    Source: Milletari et al., V-Net, 2016, arXiv:1606.04797, which squares p and t in the denominator.
    """
    p, q, t = _probs_and_targets(mask_logits, mask_targets)
    check_positive(smooth=smooth)
    return reduced(_share(_area(_errors(p, q, t)), 2 * _area(p * t) + smooth), reduction)


class MaskDiceLoss(MaskLoss):
    """`mask_dice_loss` with its smoothing."""

    def __init__(self, smooth: float = 1.0, reduction: Reduction = "none") -> None:
        super().__init__(mask_dice_loss, smooth=smooth, reduction=reduction)


def mask_weighted_dice_loss(
    mask_logits: Tensor,
    mask_targets: Tensor,
    *,
    positive_weight: float,
    negative_weight: float,
    smooth: float = 1.0,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Compute the Dice loss with weights α for positive and β for negative pixels.

    With p = sigmoid(mask_logits), t = mask_targets and w = α t + β (1 - t),
    loss = 1 - (2 Σ w p t + s) / (Σ w (p + t) + s). With β < α, false positives cost less than false negatives.

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: same shape as the logits, in [0, 1].
        positive_weight: α >= 0.
        negative_weight: β >= 0.
        smooth: s > 0, in weighted pixels.
        reduction: "none" returns (P,), or (...); "sum" and "mean" return a scalar.

    Returns:
        At least float32, in [0, 1]. Empty input returns an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ, a weight is negative, or smooth <= 0.

    Example:
        >>> import torch
        >>> target = torch.tensor([[[1., 0.]]])
        >>> mask_weighted_dice_loss(
        ...     torch.zeros(1, 1, 2), target, positive_weight=3.0, negative_weight=1.0
        ... )  # Σ w p t = 3/2 and Σ w (p + t) = 3 · 3/2 + 1/2: 1 - (3 + 1) / (5 + 1)
        tensor([0.3333])

    Source: no paper; the sums of Dice, with pixels weighted as in `mask_weighted_bce_loss`.
    """
    p, q, t = _probs_and_targets(mask_logits, mask_targets)
    check_in_range(0, positive_weight=positive_weight, negative_weight=negative_weight)
    check_positive(smooth=smooth)
    w = positive_weight * t + negative_weight * (1 - t)
    return reduced(_share(_area(w * _errors(p, q, t)), 2 * _area(w * p * t) + smooth), reduction)


class MaskWeightedDiceLoss(MaskLoss):
    """`mask_weighted_dice_loss` with its α, β and smoothing."""

    def __init__(
        self,
        positive_weight: float,
        negative_weight: float,
        smooth: float = 1.0,
        reduction: Reduction = "none",
    ) -> None:
        super().__init__(
            mask_weighted_dice_loss,
            positive_weight=positive_weight,
            negative_weight=negative_weight,
            smooth=smooth,
            reduction=reduction,
        )


def mask_background_dice_loss(
    mask_logits: Tensor, mask_targets: Tensor, *, smooth: float = 1.0, reduction: Reduction = "none"
) -> Tensor:
    r"""Compute the Dice loss of the background: `mask_dice_loss` with 1 - p for p and 1 - t for t.

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: same shape as the logits, in [0, 1].
        smooth: s > 0, in pixels.
        reduction: "none" returns (P,), or (...); "sum" and "mean" return a scalar.

    Returns:
        At least float32, in [0, 1]. Empty input returns an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ, or smooth <= 0.

    Example:
        >>> import torch
        >>> mask_background_dice_loss(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))  # 1 - (2 · 2 + 1) / (2 + 4 + 1)
        tensor([0.2857])

    Source: no paper; the formula of Dice with object and background exchanged.
    """
    check_same_shape(mask_logits=mask_logits, mask_targets=mask_targets)
    return mask_dice_loss(
        -at_least_float32(mask_logits), 1 - at_least_float32(mask_targets), smooth=smooth, reduction=reduction
    )


class MaskBackgroundDiceLoss(MaskLoss):
    """`mask_background_dice_loss` with its smoothing."""

    def __init__(self, smooth: float = 1.0, reduction: Reduction = "none") -> None:
        super().__init__(mask_background_dice_loss, smooth=smooth, reduction=reduction)


def mask_generalized_dice_loss(
    mask_logits: Tensor, mask_targets: Tensor, *, reduction: Reduction = "none"
) -> Tensor:
    r"""Compute the generalized Dice loss of object and background, each weighted by one over its squared area.

    With l in {object, background}, p_l and t_l their probabilities and targets, and w_l = 1 / max(Σ t_l, 1)²,
    loss = 1 - 2 Σ_l w_l Σ p_l t_l / Σ_l w_l Σ (p_l + t_l).

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: same shape as the logits, in [0, 1].
        reduction: "none" returns (P,), or (...); "sum" and "mean" return a scalar.

    Returns:
        At least float32, in [0, 1]. Empty input returns an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> import torch
        >>> target = torch.tensor([[[1., 0., 0.]]])  # weights 1 and 1/4: 1 - 2 (1/2 + 1/4) / (5/2 + 7/8)
        >>> mask_generalized_dice_loss(torch.zeros(1, 1, 3), target)
        tensor([0.5556])

    Source: Sudre et al., Generalised Dice overlap, 2017, arXiv:1707.03237. The paper divides by 0 where there is no
    object; the lower bound of one pixel for an area is an addition.
    """
    p, q, t = _probs_and_targets(mask_logits, mask_targets)
    errors = _area(_errors(p, q, t))  # equal for object and background
    wrong, overlap = torch.zeros(()), torch.zeros(())
    for p_l, t_l in ((p, t), (q, 1 - t)):
        w_l = _area(t_l).clamp(min=1.0) ** -2
        wrong = wrong + w_l * errors
        overlap = overlap + w_l * _area(p_l * t_l)
    return reduced(_share(wrong, 2 * overlap), reduction)


class MaskGeneralizedDiceLoss(MaskLoss):
    """`mask_generalized_dice_loss` as a term."""

    def __init__(self, reduction: Reduction = "none") -> None:
        super().__init__(mask_generalized_dice_loss, reduction=reduction)


#: Where 1 - TI is smaller, a line through 0 replaces its power below 1, whose slope at 0 is infinite.
_LEAST_TVERSKY_LOSS = 1e-12


def mask_tversky_loss(
    mask_logits: Tensor,
    mask_targets: Tensor,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 1.0,
    smooth: float = 1.0,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Compute the Tversky loss, a Dice loss with separate weights of false positives and false negatives.

    With p = sigmoid(mask_logits), t = mask_targets and
    TI = (Σ p t + s) / (Σ p t + α Σ p (1 - t) + β Σ (1 - p) t + s), loss = (1 - TI)^γ. γ other than 1 is the focal
    Tversky loss. α = β = 1/2 is the Dice loss with a smoothing of 2 s; α = β = 1 is 1 - IoU.

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: same shape as the logits, in [0, 1].
        alpha: α >= 0, the weight of false positives.
        beta: β >= 0, the weight of false negatives.
        gamma: γ > 0. The paper of the focal Tversky loss has 3/4; it writes the exponent as 1/γ with γ = 4/3. For
            γ < 1, whose slope at 0 is infinite, the loss is linear where 1 - TI is below 1e-12.
        smooth: s > 0, in pixels.
        reduction: "none" returns (P,), or (...); "sum" and "mean" return a scalar.

    Returns:
        At least float32, in [0, 1]. Empty input returns an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ, or a knob is out of its range.

    Example:
        >>> import torch
        >>> mask_tversky_loss(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))  # 1 - (2 + 1) / (2 + 0.7 · 2 + 1)
        tensor([0.3182])

    Source: Salehi et al., Tversky loss, 2017, arXiv:1706.05721; Abraham and Khan, focal Tversky loss, 2018,
    arXiv:1810.07842.
    """
    p, q, t = _probs_and_targets(mask_logits, mask_targets)
    check_in_range(0, alpha=alpha, beta=beta)
    check_positive(gamma=gamma, smooth=smooth)
    errors = alpha * _area(p * (1 - t)) + beta * _area(q * t)
    loss = _share(errors, _area(p * t) + smooth)  # 1 - TI
    if gamma >= 1:
        return reduced(loss if gamma == 1 else loss**gamma, reduction)
    least = _LEAST_TVERSKY_LOSS
    power = torch.where(loss < least, loss * least ** (gamma - 1), loss.clamp(min=least) ** gamma)
    return reduced(power, reduction)


class MaskTverskyLoss(MaskLoss):
    """`mask_tversky_loss` with its α, β, γ and smoothing."""

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 1.0,
        smooth: float = 1.0,
        reduction: Reduction = "none",
    ) -> None:
        super().__init__(
            mask_tversky_loss, alpha=alpha, beta=beta, gamma=gamma, smooth=smooth, reduction=reduction
        )


def mask_lovasz_loss(mask_logits: Tensor, mask_targets: Tensor, *, reduction: Reduction = "none") -> Tensor:
    r"""Compute the Lovász hinge, a convex surrogate of 1 - IoU of the thresholded mask.

    With targets y = ±1, errors m = 1 - y · mask_logits in descending order, and Δ(k) = 1 - IoU of a mask that is
    wrong in the k pixels with the largest errors, loss = Σ_k max(m_k, 0) (Δ(k) - Δ(k - 1)).

    Args:
        mask_logits: (P, M, M), or (..., H, W): scores with the threshold at 0.
        mask_targets: same shape as the logits; thresholded at 0.5, because a pixel is either right or wrong.
        reduction: "none" returns (P,), or (...); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0; 0 where every pixel is right by a margin of 1. Empty input returns an empty tensor, or
        0 when reduced.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> import torch
        >>> mask_lovasz_loss(torch.tensor([[[1., -1.]]]), torch.ones(1, 1, 2))  # one error of 2, times 1 - IoU = 1/2
        tensor([1.])

    Source: Berman et al., The Lovász-Softmax loss, 2018, arXiv:1705.08790, algorithm 1 and section 3.1.
    """
    check_same_shape(mask_logits=mask_logits, mask_targets=mask_targets)
    logits = at_least_float32(mask_logits).flatten(-2)
    wanted = at_least_float32(mask_targets).flatten(-2) >= 0.5
    errors, order = (1 - torch.where(wanted, logits, -logits)).sort(dim=-1, descending=True)
    wanted = wanted.gather(-1, order)
    # A mask that is wrong in the k worst pixels misses the object's pixels among them and gains the others. The steps
    # of Δ(k) = 1 - I / U are written out, because at a million pixels float32 cannot resolve their differences. With I
    # and U after the step, another missed pixel costs 1 / U, and another false positive I / (U (U - 1)).
    hits = wanted.cumsum(dim=-1)  # int64, which counts exactly
    area = hits[..., -1:]
    intersection, union = area - hits, area + (~wanted).cumsum(dim=-1)
    intersection, union = intersection.to(errors.dtype), union.to(errors.dtype)
    false_positive = intersection / (union * (union - 1).clamp(min=1))
    # Without an object, the first false positive takes the IoU from 1 to 0.
    false_positive = torch.where(union == 1, 1.0, false_positive)
    steps = torch.where(wanted, 1 / union.clamp(min=1), false_positive)
    return reduced((F.relu(errors) * steps).sum(dim=-1), reduction)


class MaskLovaszLoss(MaskLoss):
    """`mask_lovasz_loss` as a term."""

    def __init__(self, reduction: Reduction = "none") -> None:
        super().__init__(mask_lovasz_loss, reduction=reduction)


def _probs_and_targets(mask_logits: Tensor, mask_targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return p = sigmoid(mask_logits), 1 - p and t = mask_targets of each pixel, at least float32."""
    check_same_shape(mask_logits=mask_logits, mask_targets=mask_targets)
    p, q = probabilities(at_least_float32(mask_logits))
    return p, q, mask_targets.to(p.dtype)


def _errors(p: Tensor, q: Tensor, t: Tensor) -> Tensor:
    """Return the error of each pixel, p (1 - t) + q t with q = 1 - p: false positives plus false negatives."""
    return p * (1 - t) + q * t


def _share(wrong: Tensor, right: Tensor) -> Tensor:
    """Return wrong / (wrong + right) = 1 - right / (wrong + right), in the form that float32 computes accurately.

    Where nearly all is wrong, the first form has inaccurate gradients. Where nearly all is right, the second has an
    inaccurate value: three digits of a loss of 1e-4.
    """
    total = wrong + right
    return torch.where(wrong < right, wrong / total, 1 - right / total)


def _area(values: Tensor) -> Tensor:
    return values.sum(dim=(-2, -1))
