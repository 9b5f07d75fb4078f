"""Arithmetic that several losses share: float32 under half inputs, exact probabilities, the three reductions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskloss.losses.checks import Reduction, check_reduction


def power(base: Tensor, exponent: float) -> Tensor:
    """Return `base ** exponent` for a base >= 0 and an exponent >= 0, with a slope of 0 where the base is 0.

    There autograd has infinity for an exponent below 1, and NaN once that is multiplied by a loss of 0. A base that
    rounding has taken below 0 counts as 0, since other powers of it are NaN.
    """
    base = base.clamp(min=0)
    if exponent == 0 or exponent >= 1:
        return base**exponent
    above = base > 0
    return torch.where(above, torch.where(above, base, 1.0) ** exponent, 0.0)


def sigmoid_focal(logits: Tensor, targets: Tensor, alpha: float | None, gamma: float) -> Tensor:
    """Give the focal loss of each logit: with p_t the probability of its target, -α_t (1 - p_t)^γ log p_t.

    `torchvision.ops.sigmoid_focal_loss` for every γ >= 0: that has no gradient for γ in (0, 1) where p_t is 1.

    Args:
        logits: at least float32, of any shape.
        targets: of the same shape and dtype, in [0, 1].
        alpha: α in [0, 1], of positives; None for no such weights.
        gamma: γ >= 0.
    """
    p, q = probabilities(logits)
    missed = p * (1 - targets) + q * targets  # 1 - p_t
    values = power(missed, gamma) * binary_cross_entropy(logits, targets)
    return values if alpha is None else (alpha * targets + (1 - alpha) * (1 - targets)) * values


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -t log p - (1 - t) log(1 - p) of each logit.

    `F.binary_cross_entropy_with_logits` for logits far from 0 too, where that one's slope p - t keeps few digits.
    """
    return -(targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits))


def probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return p = sigmoid(logits) and q = 1 - p, the smaller of the two exact to rounding.

    Where p is near 1, `1 - p` and the slope p (1 - p) of `sigmoid` keep few digits in float32: at a logit of 12 they
    are 1 % off, at 17 they are 0.
    """
    # By products, not by torch.where, which takes ten times as long on a CPU. The sign is a constant of ±1, also at 0,
    # where abs has no slope.
    is_high = (logits > 0).to(logits.dtype)
    sign = 1 - 2 * is_high
    smaller = sign * (sign * logits).sigmoid()
    return is_high + smaller, (1 - is_high) - smaller


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision and bool become float32; float32 and float64 pass unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def reduced(values: Tensor, reduction: Reduction) -> Tensor:
    """Apply `reduction` to one value per RoI.

    The mean of nothing is 0 and still backpropagates, where torch's own mean gives NaN.

    Raises:
        ValueError: the reduction is none of "none", "sum" and "mean".
    """
    if check_reduction(reduction) == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / max(values.numel(), 1)
