"""Class losses for many classes of which few have many examples: seesaw, EQL v2, federated.

Each is a pure function of what is known about the classes, and a Module that gathers it. What a Module has
gathered is in its `state_dict`, which a training run keeps in its checkpoints; it grows only where the Module is in
training mode and gradients are computed, so not in an evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskloss.losses.arithmetic import at_least_float32, reduced
from maskloss.losses.checks import Reduction, check_in_range, check_positive, check_reduction
from maskloss.losses.classification import foreground_of

#: Lowest score of a RoI's own class in the seesaw's ratios.
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
    r"""Seesaw loss: cross-entropy that spares rare classes what frequent ones' examples do to them.

    In the softmax of a RoI of class i another class j stands with S_ij e^z_j instead of e^z_j. With N the classes'
    counts, and σ = softmax(class_logits), S_ij is the product of min(1, N_j / N_i)^p, which mitigates the
    push on a rarer class, and max(1, σ_j / max(σ_i, 0.01))^q, which brings it back where j is mistaken for i.
    Between a class and the background S is 1. No gradient goes through S.

    Args:
        class_logits: (R, C), pre-softmax.
        labels: (R,) int64 in [0, C), 0 is background.
        class_counts: (C,), N >= 0: examples seen so far; entry 0 is not read, and fewer than 1 count as 1.
        p: >= 0; 0 mitigates nothing.
        q: >= 0; 0 compensates nothing.
        reduction: "none" gives (R,); "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0. R = 0 gives shape (0,), or 0 when reduced.

    Raises:
        ValueError: `class_counts` has not one entry per class, or a knob is negative.

    Source: Wang et al., Seesaw loss, 2020, arXiv:2008.10032, equations 3 to 7. The paper takes the background
    out of the softmax, into an objectness of its own; here the head is torchvision's, and the background stays in.
    The floor of 0.01 under σ_i is mmdetection 3.3.0's.
    """
    check_in_range(0, p=p, q=q)
    _check_per_class("class_counts", class_counts, class_logits)
    logits = at_least_float32(class_logits)
    counts = class_counts.to(logits).clamp(min=1.0)
    rarer = counts / counts[labels][:, None]  # (R, C)
    scores = logits.detach().softmax(dim=1)
    own = scores.gather(1, labels[:, None]).clamp(min=_LEAST_SCORE)
    log_factors = p * rarer.clamp(max=1.0).log() + q * (scores / own).clamp(min=1.0).log()
    classes = torch.arange(logits.shape[1], device=labels.device)
    untouched = (labels[:, None] == classes) | (classes == 0) | (labels == 0)[:, None]
    logits = logits + log_factors.masked_fill(untouched, 0.0)
    return reduced(F.cross_entropy(logits, labels, reduction="none"), reduction)


class SeesawLoss(nn.Module):
    """`seesaw_loss` that counts the classes as it sees them.

    Args:
        num_classes: C, background included.
        p: of `seesaw_loss`.
        q: of `seesaw_loss`.
    """

    class_counts: Tensor

    def __init__(
        self, num_classes: int, p: float = 0.8, q: float = 2.0, reduction: Reduction = "none"
    ) -> None:
        super().__init__()
        check_in_range(0, p=p, q=q)
        check_in_range(2, num_classes=num_classes)
        self.p = p
        self.q = q
        self.reduction = check_reduction(reduction)
        self.register_buffer("class_counts", torch.zeros(num_classes))

    def extra_repr(self) -> str:
        """Show the knobs."""
        return f"num_classes={self.class_counts.numel()}, p={self.p:g}, q={self.q:g}"

    def forward(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Count the labels, then see `seesaw_loss`."""
        _check_per_class("class_counts", self.class_counts, class_logits)
        if self.training and torch.is_grad_enabled():
            ones = torch.ones_like(labels, dtype=self.class_counts.dtype)
            seen = torch.zeros_like(self.class_counts).index_add_(0, labels, ones)
            self.class_counts += _summed_over_processes(seen)
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
    r"""EQL v2: per-class cross-entropy, weighted so that each class's positive gradients balance its negative ones.

    With g_j the sum of class j's positive gradients over that of its negative ones, and
    f(g) = 1 / (1 + e^(-γ (g - μ))), a RoI of class j counts 1 + α (1 - f(g_j)) for class j, and every other RoI f(g_j).

    Args:
        class_logits: (R, C), pre-sigmoid; channel 0 is ignored, see `class_sigmoid_loss`.
        labels: (R,) int64 in [0, C), 0 is background.
        gradient_ratio: (C,), g >= 0; entry 0 is not read.
        gamma: γ > 0, how steep f is.
        mu: μ >= 0, where f is 1/2.
        alpha: α >= 0, how much more a positive may count.
        reduction: "none" gives (R,), summed over the classes; "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0. R = 0 gives shape (0,), or 0 when reduced.

    Raises:
        ValueError: `gradient_ratio` has not one entry per class, or a knob is out of its range.

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
    of_negatives = (gamma * (gradient_ratio - mu)).sigmoid()
    of_positives = 1 + alpha * (1 - of_negatives)
    return of_positives * targets + of_negatives * (1 - targets)


class EqualizationLossV2(nn.Module):
    """`equalization_loss_v2` that sums up the gradients as it goes.

    Args:
        num_classes: C, background included.
        gamma: of `equalization_loss_v2`.
        mu: of `equalization_loss_v2`.
        alpha: of `equalization_loss_v2`.
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
        check_in_range(2, num_classes=num_classes)
        self.gamma = gamma
        self.mu = mu
        self.alpha = alpha
        self.reduction = check_reduction(reduction)
        self.register_buffer("positive_gradients", torch.zeros(num_classes))
        self.register_buffer("negative_gradients", torch.zeros(num_classes))

    @property
    def gradient_ratio(self) -> Tensor:
        """(C,): of positive to negative gradients; 100, which weighs nothing down, where there are none yet."""
        ratio = self.positive_gradients / self.negative_gradients.clamp(min=1e-10)
        return torch.where(self.negative_gradients > 0, ratio, torch.full_like(ratio, 100.0))

    def extra_repr(self) -> str:
        """Show the knobs."""
        knobs = f"gamma={self.gamma:g}, mu={self.mu:g}, alpha={self.alpha:g}"
        return f"num_classes={self.positive_gradients.numel()}, {knobs}"

    def forward(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """See `equalization_loss_v2`; then add this batch's gradients."""
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
            for sums, of_these in (
                (self.positive_gradients, targets),
                (self.negative_gradients, 1 - targets),
            ):
                sums[1:] += _summed_over_processes((gradients * of_these).sum(dim=0).to(sums.dtype))
        return values


def federated_loss(
    class_logits: Tensor, labels: Tensor, *, counted_classes: Tensor, reduction: Reduction = "none"
) -> Tensor:
    r"""Per-class cross-entropy of some of the classes, summed over these.

    Args:
        class_logits: (R, C), pre-sigmoid; channel 0 is ignored, see `class_sigmoid_loss`.
        labels: (R,) int64 in [0, C), 0 is background.
        counted_classes: (C,) bool; entry 0 is not read.
        reduction: "none" gives (R,); "sum" and "mean" give a scalar.

    Returns:
        At least float32, >= 0. R = 0 gives shape (0,), or 0 when reduced.

    Raises:
        ValueError: `counted_classes` has not one entry per class.

    Source: Zhou et al., Probabilistic two-stage detection, 2021, arXiv:2103.07461, section 5; Detectron2 02b5c4e,
    `FastRCNNOutputLayers.sigmoid_cross_entropy_loss`.
    """
    _check_per_class("counted_classes", counted_classes, class_logits)
    logits, targets = foreground_of(class_logits, labels)
    per_class = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return reduced((per_class * counted_classes[1:].to(per_class)).sum(dim=1), reduction)


class FederatedLoss(nn.Module):
    """`federated_loss` of the batch's own classes and of others that are drawn anew for each batch.

    A class that an image's annotators were not asked about may be there all the same; so in a data set with many
    classes most negatives are better left out.

    Args:
        class_counts: images or objects of each class, (C,), background first, which is not read. A class is
            drawn with a probability that goes with its count to the power of `power`.
        num_classes: how many classes count in a batch, its own among them; its own all count, and of the others none
            whose count is 0.
        power: of the counts, >= 0.

    Source: as `federated_loss`, which has 50 classes and a power of 1/2.
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
        counts = torch.as_tensor(class_counts, dtype=torch.float32)
        if counts.dim() != 1 or not (counts.isfinite() & (counts >= 0)).all():
            raise ValueError(f"class_counts must be one finite number >= 0 per class, got {class_counts}")
        check_in_range(1, num_classes=num_classes)
        check_in_range(0, power=power)
        self.num_classes = num_classes
        self.reduction = check_reduction(reduction)
        self.register_buffer("class_weights", counts**power)

    def extra_repr(self) -> str:
        """Show how many classes count."""
        return f"num_classes={self.num_classes} of {self.class_weights.numel() - 1}"

    def forward(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Draw the classes, then see `federated_loss`."""
        _check_per_class("class_counts", self.class_weights, class_logits)
        own = torch.zeros_like(self.class_weights, dtype=torch.bool).index_fill_(0, labels, True)
        # A draw without replacement by weight is that of the largest log-weights with Gumbel noise added. The
        # batch's own classes come before all, and the background after.
        noise = -(-torch.rand_like(self.class_weights).log()).log()
        keys = (self.class_weights.log() + noise).masked_fill(own, torch.inf)
        keys[0] = -torch.inf
        drawn = keys.topk(min(self.num_classes, len(keys) - 1)).indices
        counted = own.index_fill(0, drawn, True) & (keys > -torch.inf)
        return federated_loss(class_logits, labels, counted_classes=counted, reduction=self.reduction)


def _summed_over_processes(values: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def _check_per_class(name: str, per_class: Tensor, class_logits: Tensor) -> None:
    if per_class.shape != class_logits.shape[1:]:
        raise ValueError(
            f"{name} has shape {tuple(per_class.shape)}, but class_logits has {class_logits.shape[1]} classes"
        )
