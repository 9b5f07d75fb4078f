"""Losses of objectness logits: whether there is an object at an anchor, or how good a prediction is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskloss.losses.arithmetic import at_least_float32, power, reduced, sigmoid_focal
from maskloss.losses.checks import Reduction, check_in_range, check_same_shape
from maskloss.losses.modules import LossModule


class ObjectnessLoss(LossModule):
    """An objectness loss: a term for `MaskRCNNLoss(objectness=)`."""

    def __init__(self, function: Callable[..., Tensor], **knobs: Any) -> None:
        super().__init__(function, torch.zeros(0), torch.zeros(0), **knobs)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of logits (S,) and labels (S,)."""
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
    r"""Focal loss of each anchor: with p_t the probability of what it is, -α_t (1 - p_t)^γ log p_t.

    Args:
        logits: (S,), or of any shape, pre-sigmoid.
        labels: of the same shape, in [0, 1].
        alpha: α in [0, 1], of objects; None for no such weights.
        gamma: γ >= 0; 0 is cross-entropy.
        reduction: "none" keeps the shape; "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0. Empty input gives an empty tensor, or 0 when reduced. The source divides by the
        positives: `normalizers={"objectness": per_positive}`.

    Raises:
        ValueError: shapes differ, or a knob is out of its range.

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
    r"""Quality focal loss: with σ = sigmoid(logits) and y = quality, |y - σ|^β BCE(σ, y).

    Args:
        logits: (S,), or of any shape, pre-sigmoid.
        quality: of the same shape, in [0, 1]: how good a prediction is, such as its IoU; 0 for background.
        beta: β >= 0; 0 is cross-entropy.
        reduction: "none" keeps the shape; "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0, and 0 exactly at σ = y. Empty input gives an empty tensor, or 0 when reduced.

    Raises:
        ValueError: shapes differ, or β < 0.

    Source: Li et al., Generalized focal loss, 2020, arXiv:2006.04388, equation 2. As an objectness term it gets labels
    of 0 and 1, for which it is the focal loss without α.
    """
    check_same_shape(logits=logits, quality=quality)
    check_in_range(0, beta=beta)
    logits = at_least_float32(logits)
    quality = quality.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return reduced(power((quality - logits.sigmoid()).abs(), beta) * cross_entropy, reduction)


class QualityFocalLoss(ObjectnessLoss):
    """`quality_focal_loss` with its β."""

    def __init__(self, beta: float = 2.0, reduction: Reduction = "none") -> None:
        super().__init__(quality_focal_loss, beta=beta, reduction=reduction)
