"""Classification losses for long-tailed data sets, where few classes have many examples: seesaw, EQL v2, federated.

Each is a pure function of class statistics, with a Module. `SeesawLoss` and `EqualizationLossV2` collect the statistics
in training mode with gradients enabled, so not in an evaluation; `FederatedLoss` is given them. They are in the
Module's `state_dict`, and thus in the checkpoints of a training run. Shapes: see `maskloss.losses`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskloss.losses.arithmetic import at_least_float32, reduced
from maskloss.losses.checks import (
    Reduction,
    check_class_values,
    check_in_range,
    check_integer,
    check_labels,
    check_positive,
    check_reduction,
)
from maskloss.losses.classification import cross_entropy, foreground_of

#: Lower bound of the score of a RoI's own class in the ratios of the seesaw loss.
_LEAST_SCORE = 1e-2


def seesaw_loss(
    class_logits: Tensor,
    labels: Tensor,
    *,
    class_counts: Tensor,
    p: float = 0.8,
    q: float = 2.0,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Compute the seesaw loss, a cross-entropy in which examples of frequent classes suppress rare classes less.

    In the softmax of a RoI of class i, the term e^z_j of another class j is multiplied by S_ij. With N_j the number of
    examples of class j and σ = softmax(class_logits), S_ij is the product of min(1, N_j / N_i)^p, which mitigates the
    suppression of a rarer class, and max(1, σ_j / max(σ_i, 0.01))^q, which compensates for it where j scores higher
    than the RoI's own class. Between a class and the background, S is 1. No gradient flows through S.

    Args:
        class_logits: (R, C), pre-softmax.
        labels: (R,) int64 in [0, C), 0 is background.
        class_counts: (C,), N >= 0, the number of examples so far. Entry 0 is not read; counts below 1 count as 1.
        p: >= 0, exponent of the mitigation; 0 is no mitigation.
        q: >= 0, exponent of the compensation; 0 is no compensation.
        reduction: "none" returns (R,); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0. R = 0 returns shape (0,), or 0 when reduced.

    Raises:
        ValueError: `class_counts` does not have one entry per class, or a knob is out of its range.

    Example:
        >>> import torch
        >>> counts = torch.tensor([0., 100., 1.])
        >>> seesaw_loss(torch.zeros(1, 3), torch.tensor([1]), class_counts=counts, p=0.5)  # ln(1 + 1 + √(1/100))
        tensor([0.7419])

    Source: Wang et al., Seesaw loss, 2020, arXiv:2008.10032, equations 3 to 7. The paper moves the background from
    the softmax to a separate objectness; here the head is torchvision's, and the background stays in the softmax.
    The lower bound of 0.01 for σ_i is from mmdetection 3.3.0.
    """
    check_in_range(0, p=p, q=q)
    _check_per_class("class_counts", class_counts, class_logits)
    check_labels(labels, class_logits.shape[0])
    logits = at_least_float32(class_logits)
    counts = class_counts.to(logits).clamp(min=1.0)
    count_ratios = counts / counts[labels][:, None]  # (R, C)
    scores = logits.detach().softmax(dim=1)
    own = scores.gather(1, labels[:, None]).clamp(min=_LEAST_SCORE)
    log_factors = p * count_ratios.clamp(max=1.0).log() + q * (scores / own).clamp(min=1.0).log()
    classes = torch.arange(logits.shape[1], device=labels.device)
    untouched = (labels[:, None] == classes) | (classes == 0) | (labels == 0)[:, None]
    logits = logits + log_factors.masked_fill(untouched, 0.0)
    return reduced(cross_entropy(logits, labels), reduction)


class SeesawLoss(nn.Module):
    """`seesaw_loss` that counts the examples of each class during training.

    Args:
        num_classes: C, including the background.
        p: see `seesaw_loss`.
        q: see `seesaw_loss`.

    Example:
        >>> import torch
        >>> loss = SeesawLoss(num_classes=3)
        >>> _ = loss(torch.zeros(2, 3), torch.tensor([1, 1]))
        >>> loss.class_counts
        tensor([0., 2., 0.])
    """

    class_counts: Tensor

    def __init__(
        self, num_classes: int, p: float = 0.8, q: float = 2.0, reduction: Reduction = "none"
    ) -> None:
        super().__init__()
        check_in_range(0, p=p, q=q)
        check_integer(num_classes=num_classes)
        check_in_range(2, num_classes=num_classes)
        self.p = p
        self.q = q
        self.reduction = check_reduction(reduction)
        self.register_buffer("class_counts", torch.zeros(num_classes))

    def extra_repr(self) -> str:
        """Show the knobs."""
        return f"num_classes={self.class_counts.numel()}, p={self.p:g}, q={self.q:g}"

    def forward(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Count the labels, then compute `seesaw_loss`."""
        _check_per_class("class_counts", self.class_counts, class_logits)
        check_labels(labels, class_logits.shape[0])
        if self.training and torch.is_grad_enabled():
            ones = torch.ones_like(labels, dtype=self.class_counts.dtype)
            counts = torch.zeros_like(self.class_counts).index_add_(0, labels, ones)
            self.class_counts += _sum_over_processes(counts)
        return seesaw_loss(
            class_logits, labels, class_counts=self.class_counts, p=self.p, q=self.q, reduction=self.reduction
        )


def equalization_loss_v2(
    class_logits: Tensor,
    labels: Tensor,
    *,
    gradient_ratio: Tensor,
    gamma: float = 12.0,
    mu: float = 0.8,
    alpha: float = 4.0,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Compute EQL v2, a weighted per-class binary cross-entropy that balances positive and negative gradients.

    With g_j the sum of class j's positive gradients divided by the sum of its negative ones, and
    f(g) = 1 / (1 + e^(-γ (g - μ))), the weight in the cross-entropy of class j is 1 + α (1 - f(g_j)) for RoIs of
    class j, and f(g_j) for all other RoIs.

    Args:
        class_logits: (R, C), pre-sigmoid; channel 0 is ignored, see `class_sigmoid_loss`.
        labels: (R,) int64 in [0, C), 0 is background.
        gradient_ratio: (C,), g >= 0; entry 0 is not read.
        gamma: γ > 0, the steepness of f.
        mu: μ >= 0, where f is 1/2.
        alpha: α >= 0, the largest extra weight of a positive.
        reduction: "none" returns (R,), summed over the classes; "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0. R = 0 returns shape (0,), or 0 when reduced.

    Raises:
        ValueError: `gradient_ratio` does not have one entry per class, or a knob is out of its range.

    Example:
        >>> import torch
        >>> ratio = torch.tensor([0., 0.8, 0.8])  # at μ: f = 1/2, the weights are 1 + 4 · 1/2 = 3 and 1/2
        >>> equalization_loss_v2(torch.zeros(1, 3), torch.tensor([1]), gradient_ratio=ratio)  # 3.5 ln 2
        tensor([2.4260])

    Source: Tan et al., Equalization loss v2, 2020, arXiv:2012.08548, equations 4 to 6.
    """
    check_positive(gamma=gamma)
    check_in_range(0, mu=mu, alpha=alpha)
    _check_per_class("gradient_ratio", gradient_ratio, class_logits)
    logits, targets = foreground_of(class_logits, labels)
    weights = _equalizing_weights(targets, gradient_ratio[1:].to(logits), gamma, mu, alpha)
    per_class = weights * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return reduced(per_class.sum(dim=1), reduction)


def _equalizing_weights(
    targets: Tensor, gradient_ratio: Tensor, gamma: float, mu: float, alpha: float
) -> Tensor:
    """Return the weights (R, C - 1) of the foreground classes, for targets (R, C - 1) and ratios (C - 1,)."""
    negative_weights = (gamma * (gradient_ratio - mu)).sigmoid()
    positive_weights = 1 + alpha * (1 - negative_weights)
    return positive_weights * targets + negative_weights * (1 - targets)


class EqualizationLossV2(nn.Module):
    """`equalization_loss_v2` that accumulates the gradients of each class during training.

    Args:
        num_classes: C, including the background.
        gamma: see `equalization_loss_v2`.
        mu: see `equalization_loss_v2`.
        alpha: see `equalization_loss_v2`.

    Example:
        >>> import torch
        >>> loss = EqualizationLossV2(num_classes=3)
        >>> _ = loss(torch.zeros(1, 3), torch.tensor([1]))  # |sigmoid(0) - target| = 1/2
        >>> loss.positive_gradients, loss.negative_gradients
        (tensor([0.0000, 0.5000, 0.0000]), tensor([0.0000, 0.0000, 0.5000]))
    """

    positive_gradients: Tensor
    negative_gradients: Tensor

    def __init__(
        self,
        num_classes: int,
        gamma: float = 12.0,
        mu: float = 0.8,
        alpha: float = 4.0,
        reduction: Reduction = "none",
    ) -> None:
        super().__init__()
        check_positive(gamma=gamma)
        check_in_range(0, mu=mu, alpha=alpha)
        check_integer(num_classes=num_classes)
        check_in_range(2, num_classes=num_classes)
        self.gamma = gamma
        self.mu = mu
        self.alpha = alpha
        self.reduction = check_reduction(reduction)
        self.register_buffer("positive_gradients", torch.zeros(num_classes))
        self.register_buffer("negative_gradients", torch.zeros(num_classes))

    @property
    def gradient_ratio(self) -> Tensor:
        """(C,) ratios of positive to negative gradients; 100, for weights of 1, before the first negative gradient."""
        ratio = self.positive_gradients / self.negative_gradients.clamp(min=1e-10)
        return torch.where(self.negative_gradients > 0, ratio, torch.full_like(ratio, 100.0))

    def extra_repr(self) -> str:
        """Show the knobs."""
        knobs = f"gamma={self.gamma:g}, mu={self.mu:g}, alpha={self.alpha:g}"
        return f"num_classes={self.positive_gradients.numel()}, {knobs}"

    def forward(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Compute `equalization_loss_v2`, then add the gradients of this batch."""
        ratio = self.gradient_ratio
        values = equalization_loss_v2(
            class_logits,
            labels,
            gradient_ratio=ratio,
            gamma=self.gamma,
            mu=self.mu,
            alpha=self.alpha,
            reduction=self.reduction,
        )
        if self.training and torch.is_grad_enabled():
            logits, targets = foreground_of(class_logits.detach(), labels)
            weights = _equalizing_weights(targets, ratio[1:].to(logits), self.gamma, self.mu, self.alpha)
            gradients = weights * (logits.sigmoid() - targets).abs()
            for sums, selection in (
                (self.positive_gradients, targets),
                (self.negative_gradients, 1 - targets),
            ):
                sums[1:] += _sum_over_processes((gradients * selection).sum(dim=0).to(sums.dtype))
        return values


def federated_loss(
    class_logits: Tensor, labels: Tensor, *, counted_classes: Tensor, reduction: Reduction = "none"
) -> Tensor:
    r"""Compute the per-class binary cross-entropy, summed over a subset of the classes.

    Args:
        class_logits: (R, C), pre-sigmoid; channel 0 is ignored, see `class_sigmoid_loss`.
        labels: (R,) int64 in [0, C), 0 is background.
        counted_classes: (C,) bool, the subset; entry 0 is not read.
        reduction: "none" returns (R,); "sum" and "mean" return a scalar.

    Returns:
        At least float32, >= 0. R = 0 returns shape (0,), or 0 when reduced.

    Raises:
        ValueError: `counted_classes` does not have one entry per class.

    Example:
        >>> import torch
        >>> counted = torch.tensor([False, True, False, True])
        >>> federated_loss(torch.zeros(1, 4), torch.tensor([1]), counted_classes=counted)  # 2 ln 2
        tensor([1.3863])

    Source: Zhou et al., Probabilistic two-stage detection, 2021, arXiv:2103.07461, section 5; Detectron2 02b5c4e,
    `FastRCNNOutputLayers.sigmoid_cross_entropy_loss`.
    """
    _check_per_class("counted_classes", counted_classes, class_logits)
    logits, targets = foreground_of(class_logits, labels)
    per_class = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return reduced((per_class * counted_classes[1:].to(per_class)).sum(dim=1), reduction)


class FederatedLoss(nn.Module):
    """`federated_loss` of the classes in the batch and of other classes, sampled for each batch.

    In a data set with many classes, annotators check each image for a few classes only. An object of another class
    may be present without a label, so most negatives are left out of the loss.

    Args:
        class_counts: (C,), the number of images or objects of each class. Entry 0, the background, is not read. The
            probability that a class is sampled is proportional to its count to the power of `power`.
        num_classes: number of classes in the loss of a batch. The classes in the batch are always included, even if
            they are more; classes with a count of 0 are never sampled.
        power: exponent of the counts, >= 0.

    Example:
        >>> import torch
        >>> loss = FederatedLoss([0.0, 5.0, 0.0, 3.0], num_classes=2)
        >>> loss(torch.zeros(1, 4), torch.tensor([1]))  # class 1 of the batch, and class 3: 2 ln 2
        tensor([1.3863])

    Source: see `federated_loss`; there `num_classes` is 50 and `power` is 1/2.
    """

    class_weights: Tensor

    def __init__(
        self,
        class_counts: Tensor | Sequence[float],
        num_classes: int = 50,
        power: float = 0.5,
        reduction: Reduction = "none",
    ) -> None:
        super().__init__()
        counts = check_class_values(class_counts, "class_counts")
        check_integer(num_classes=num_classes)
        check_in_range(1, num_classes=num_classes)
        check_in_range(0, power=power)
        self.num_classes = num_classes
        self.reduction = check_reduction(reduction)
        # 0**0 would be 1.
        self.register_buffer("class_weights", torch.where(counts > 0, counts**power, 0.0))

    def extra_repr(self) -> str:
        """Show how many of the foreground classes are in the loss of a batch."""
        return f"num_classes={self.num_classes} of {self.class_weights.numel() - 1}"

    def forward(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Sample the classes, then compute `federated_loss`."""
        _check_per_class("class_counts", self.class_weights, class_logits)
        check_labels(labels, class_logits.shape[0])
        own = torch.zeros_like(self.class_weights, dtype=torch.bool).index_fill_(0, labels, True)
        # The largest log-weights plus Gumbel noise are a weighted sample without replacement. The classes in the batch
        # get the largest keys, and the background the smallest.
        noise = -(-torch.rand_like(self.class_weights).log()).log()
        keys = (self.class_weights.log() + noise).masked_fill(own, torch.inf)
        keys[0] = -torch.inf
        sampled = keys.topk(min(self.num_classes, len(keys) - 1)).indices
        counted = own.index_fill(0, sampled, True) & (keys > -torch.inf)
        return federated_loss(class_logits, labels, counted_classes=counted, reduction=self.reduction)


def _sum_over_processes(values: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def _check_per_class(name: str, per_class: Tensor, class_logits: Tensor) -> None:
    if per_class.shape != class_logits.shape[1:]:
        raise ValueError(
            f"{name} has shape {tuple(per_class.shape)}, but class_logits has {class_logits.shape[1]} classes"
        )
