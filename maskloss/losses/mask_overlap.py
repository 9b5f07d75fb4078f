"""Mask losses of whole regions: Dice and its kin, Tversky, Lovász. They compare areas, not pixels.

All take the M x M grid of each RoI, or dense logits (N, C, H, W): the last two axes are the region, the others
are kept.
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
    r"""Soft Dice loss of each RoI's predicted mask.

    With p = sigmoid(mask_logits) and t = mask_targets, loss = 1 - (2 Σ p t + s) / (Σ p + Σ t + s).

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: of the same shape, in [0, 1].
        smooth: s > 0, in pixels; keeps empty against empty at no loss.
        reduction: "none" gives (P,), or (...); "sum" and "mean" give a scalar.

    Returns:
        At least float32, in [0, 1], 0 is best for binary targets. Empty input gives an empty tensor, or 0 when
        reduced.

    Raises:
        ValueError: shapes differ, or smooth <= 0.

    Example:
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
    r"""Dice loss in which positive pixels count α and negative ones β.

    With w = α t + β (1 - t), loss = 1 - (2 Σ w p t + s) / (Σ w (p + t) + s). β < α forgives what is predicted
    outside the object more than what is missed of it.

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: of the same shape, in [0, 1].
        positive_weight: α >= 0.
        negative_weight: β >= 0.
        smooth: s > 0, in weighted pixels.
        reduction: "none" gives (P,), or (...); "sum" and "mean" give a scalar.

    Returns:
        At least float32, in [0, 1]. Empty input gives an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ, a weight is negative, or smooth <= 0.

    Source: Dice's sums over pixels that are weighted as those of the weighted cross-entropy are.
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
    r"""Dice loss of the background: `mask_dice_loss` with 1 - p for p and 1 - t for t.

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: of the same shape, in [0, 1].
        smooth: s > 0, in pixels.
        reduction: "none" gives (P,), or (...); "sum" and "mean" give a scalar.

    Returns:
        At least float32, in [0, 1]. Empty input gives an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ, or smooth <= 0.

    Source: Dice's formula, with the two classes changing places.
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
    r"""Generalised Dice loss of object and background, each weighted by one over its area squared.

    With l in {object, background}, p_l and t_l their probabilities and targets, and w_l = 1 / max(Σ t_l, 1)²,
    loss = 1 - 2 Σ_l w_l Σ p_l t_l / Σ_l w_l Σ (p_l + t_l).

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: of the same shape, in [0, 1].
        reduction: "none" gives (P,), or (...); "sum" and "mean" give a scalar.

    Returns:
        At least float32, in [0, 1]. Empty input gives an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ.

    Source: Sudre et al., Generalised Dice overlap, 2017, arXiv:1707.03237. The floor of one pixel under an area
    is ours; the paper divides by 0 where there is no object.
    """
    p, q, t = _probs_and_targets(mask_logits, mask_targets)
    errors = _area(_errors(p, q, t))  # the same of object and background
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


#: Of 1 - TI, before it is raised to a power below 1, whose slope at 0 would be infinite.
_LEAST_TVERSKY_LOSS = 1e-6


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
    r"""Tversky loss: Dice with a price of its own for each kind of error; focal where γ is not 1.

    With TI = (Σ p t + s) / (Σ p t + α Σ p (1 - t) + β Σ (1 - p) t + s), loss = (1 - TI)^γ. α = β = 1/2 is
    Dice (with 2 s for s), α = β = 1 is 1 - IoU.

    Args:
        mask_logits: (P, M, M), or (..., H, W), pre-sigmoid.
        mask_targets: of the same shape, in [0, 1].
        alpha: α >= 0, the price of false positives.
        beta: β >= 0, of false negatives.
        gamma: γ > 0. The focal Tversky loss has 3/4: its paper writes the exponent as 1 / γ with γ = 4/3.
        smooth: s > 0, in pixels.
        reduction: "none" gives (P,), or (...); "sum" and "mean" give a scalar.

    Returns:
        At least float32, in [0, 1]. Empty input gives an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ, or a knob is out of its range.

    Source: Salehi et al., Tversky loss, 2017, arXiv:1706.05721; Abraham and Khan, focal Tversky loss, 2018,
    arXiv:1810.07842.
    """
    p, q, t = _probs_and_targets(mask_logits, mask_targets)
    check_in_range(0, alpha=alpha, beta=beta)
    check_positive(gamma=gamma, smooth=smooth)
    errors = alpha * _area(p * (1 - t)) + beta * _area(q * t)
    loss = _share(errors, _area(p * t) + smooth)  # 1 - TI
    return reduced(loss if gamma == 1 else loss.clamp(min=_LEAST_TVERSKY_LOSS) ** gamma, reduction)


class MaskTverskyLoss(MaskLoss):
    """`mask_tversky_loss` with its prices, its exponent and its smoothing."""

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
    r"""Lovász hinge: a convex stand-in for 1 - IoU of the thresholded mask.

    With y = ±1 the targets, errors m = 1 - y · mask_logits sorted downwards and Δ(k) = 1 - IoU of a mask that is
    wrong in its k worst pixels, loss = Σ_k max(m_k, 0) (Δ(k) - Δ(k - 1)).

    Args:
        mask_logits: (P, M, M), or (..., H, W): scores with the threshold at 0.
        mask_targets: of the same shape; thresholded at 0.5, since an error is of a pixel, not of a part of it.
        reduction: "none" gives (P,), or (...); "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0; 0 where every pixel is right by a margin of 1. Empty input gives an empty tensor, or
        0 when reduced.

    Raises:
        ValueError: shapes differ.

    Source: Berman et al., The Lovász-Softmax loss, 2018, arXiv:1705.08790, algorithm 1 and section 3.1.
    """
    check_same_shape(mask_logits=mask_logits, mask_targets=mask_targets)
    logits = at_least_float32(mask_logits).flatten(-2)
    wanted = at_least_float32(mask_targets).flatten(-2) >= 0.5
    errors, order = (1 - torch.where(wanted, logits, -logits)).sort(dim=-1, descending=True)
    wanted = wanted.gather(-1, order)
    # Wrong in its k worst pixels, a mask has lost the objects' pixels among them, and won the others. The steps of
    # Δ(k) = 1 - I / U are written out, because at a million pixels float32 cannot tell neighboring Δ apart: a pixel of
    # the object more that is missed costs 1 / U, another false positive I / (U (U - 1)), with I and U after the step.
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
    """Return p, 1 - p and t of each pixel."""
    check_same_shape(mask_logits=mask_logits, mask_targets=mask_targets)
    p, q = probabilities(at_least_float32(mask_logits))
    return p, q, mask_targets.to(p.dtype)


def _errors(p: Tensor, q: Tensor, t: Tensor) -> Tensor:
    """Return p + t - 2 p t of each pixel, for q = 1 - p: what is predicted too much, plus what is missed."""
    return p * (1 - t) + q * t


def _share(wrong: Tensor, right: Tensor) -> Tensor:
    """Return wrong / (wrong + right) = 1 - right / (wrong + right), in the form whose value and slopes keep digits.

    The first loses its slopes where nearly all is wrong, the second its value where nearly all is right: float32 would
    keep three digits of a loss of 1e-4.
    """
    total = wrong + right
    return torch.where(wrong < right, wrong / total, 1 - right / total)


def _area(values: Tensor) -> Tensor:
    return values.sum(dim=(-2, -1))
