"""Losses of objectness logits: whether an anchor has an object, or how good a prediction is.

Shapes: see `maskloss.losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskloss.losses.arithmetic import (
    at_least_float32,
    binary_cross_entropy,
    power,
    probabilities,
    reduced,
    sigmoid_focal,
)
from maskloss.losses.checks import Reduction, check_in_range, check_same_shape
from maskloss.losses.modules import LossModule


class ObjectnessLoss(LossModule):
    """An objectness loss: a term for `MaskRCNNLoss(objectness=)`."""

    def __init__(self, function: Callable[..., Tensor], **knobs: Any) -> None:
        super().__init__(function, torch.zeros(0), torch.zeros(0), **knobs)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of `logits` (S,) against `labels` (S,)."""
        loss: Tensor = self.function(logits, labels, **self.knobs)
        return loss


def objectness_focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Compute the focal loss of each anchor.

    With p_t the predicted probability of the anchor's label and α_t its weight, loss = -α_t (1 - p_t)^γ log p_t. For a
    label y between 0 and 1, 1 - p_t is p (1 - y) + (1 - p) y, and BCE(p, y) takes the place of -log p_t.

    Args:
        logits: (S,), or any shape, pre-sigmoid.
        labels: same shape as the logits, in [0, 1].
        alpha: α in [0, 1], the weight of objects; background has 1 - α. None for no weights.
        gamma: γ >= 0; 0 is cross-entropy.
        reduction: "none" keeps the shape; "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0. Empty input returns an empty tensor, or 0 when reduced. To divide by the number of
        positives, as in the source, use `normalizers={"objectness": per_positive}`.

    Raises:
        ValueError: shapes differ, or a knob is out of its range.

    Example:
        >>> import torch
        >>> objectness_focal_loss(torch.zeros(1), torch.zeros(1))  # 0.75 · (1/2)² · ln 2
        tensor([0.1300])

    Source: Lin et al., Focal loss for dense object detection, 2017, arXiv:1708.02002, equation 5.
    """
    check_same_shape(logits=logits, labels=labels)
    check_in_range(0, 1, alpha=0.0 if alpha is None else alpha)
    check_in_range(0, gamma=gamma)
    logits = at_least_float32(logits)
    return reduced(sigmoid_focal(logits, labels.to(logits.dtype), alpha, gamma), reduction)


class ObjectnessFocalLoss(ObjectnessLoss):
    """`objectness_focal_loss` with its α and γ."""

    def __init__(self, alpha: float | None = 0.25, gamma: float = 2.0, reduction: Reduction = "none") -> None:
        super().__init__(objectness_focal_loss, alpha=alpha, gamma=gamma, reduction=reduction)


def quality_focal_loss(
    logits: Tensor, quality: Tensor, *, beta: float = 2.0, reduction: Reduction = "none"
) -> Tensor:
    r"""Compute the quality focal loss of each anchor.

    With σ = sigmoid(logits) and y = quality, loss = |y - σ|^β BCE(σ, y).

    Args:
        logits: (S,), or any shape, pre-sigmoid.
        quality: same shape as the logits, in [0, 1]: how good a prediction is, such as its IoU; 0 for background.
        beta: β >= 0; 0 is cross-entropy.
        reduction: "none" keeps the shape; "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0; for β > 0, exactly 0 at σ = y. Empty input returns an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ, or β < 0.

    Example:
        >>> import torch
        >>> quality_focal_loss(torch.zeros(1), torch.tensor([0.75]))  # (3/4 - 1/2)² · ln 2
        tensor([0.0433])

    Source: Li et al., Generalized focal loss, 2020, arXiv:2006.04388, equation 2. An objectness term is called with
    labels of 0 and 1, for which this is the focal loss without α.
    """
    check_same_shape(logits=logits, quality=quality)
    check_in_range(0, beta=beta)
    logits = at_least_float32(logits)
    quality = quality.to(logits.dtype)
    p, q = probabilities(logits)
    error = (quality * q - (1 - quality) * p).abs()  # |y - σ|, also where σ rounds to 1
    return reduced(power(error, beta) * binary_cross_entropy(logits, quality), reduction)


class QualityFocalLoss(ObjectnessLoss):
    """`quality_focal_loss` with its β."""

    def __init__(self, beta: float = 2.0, reduction: Reduction = "none") -> None:
        super().__init__(quality_focal_loss, beta=beta, reduction=reduction)
